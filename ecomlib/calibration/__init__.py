"""From a merchant's own records to the prior of a task family."""

from ecomlib.calibration import complete_journey
from ecomlib.calibration.preparation import CalibrationConfig
from ecomlib.calibration.pricing import PricingCalibration, calibrate_pricing
from ecomlib.calibration.sales import SalesTableError, read_sales

__all__ = [
    "CalibrationConfig",
    "PricingCalibration",
    "SalesTableError",
    "calibrate_pricing",
    "complete_journey",
    "read_sales",
]
