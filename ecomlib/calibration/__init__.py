"""From a merchant's own records to the prior of a task family."""

from ecomlib.calibration import complete_journey
from ecomlib.calibration.inventory import InventoryCalibration, InventoryConfig, calibrate_inventory, read_stock
from ecomlib.calibration.preparation import CalibrationConfig
from ecomlib.calibration.pricing import PricingCalibration, calibrate_pricing
from ecomlib.calibration.sales import SalesTableError, read_sales
from ecomlib.calibration.tables import TableError

__all__ = [
    "CalibrationConfig",
    "InventoryCalibration",
    "InventoryConfig",
    "PricingCalibration",
    "SalesTableError",
    "TableError",
    "calibrate_inventory",
    "calibrate_pricing",
    "complete_journey",
    "read_sales",
    "read_stock",
]
