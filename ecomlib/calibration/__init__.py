"""From a merchant's own records to the prior of a task family."""

from ecomlib.calibration import complete_journey, open_bandit
from ecomlib.calibration.auction_statistics import PublishedAuctions, auction_prior
from ecomlib.calibration.auctions import read_auctions
from ecomlib.calibration.bidding import BiddingCalibration, BiddingConfig, calibrate_bidding
from ecomlib.calibration.clicks import read_clicks, taste_spread
from ecomlib.calibration.inventory import InventoryCalibration, InventoryConfig, calibrate_inventory, read_stock
from ecomlib.calibration.preparation import CalibrationConfig
from ecomlib.calibration.pricing import PricingCalibration, calibrate_pricing
from ecomlib.calibration.recommendation import (
    RecommendationCalibration,
    RecommendationConfig,
    calibrate_recommendation,
)
from ecomlib.calibration.sales import SalesTableError, read_sales
from ecomlib.calibration.tables import TableError

__all__ = [
    "BiddingCalibration",
    "BiddingConfig",
    "CalibrationConfig",
    "InventoryCalibration",
    "InventoryConfig",
    "PricingCalibration",
    "PublishedAuctions",
    "RecommendationCalibration",
    "RecommendationConfig",
    "SalesTableError",
    "TableError",
    "auction_prior",
    "calibrate_bidding",
    "calibrate_inventory",
    "calibrate_pricing",
    "calibrate_recommendation",
    "complete_journey",
    "open_bandit",
    "read_auctions",
    "read_clicks",
    "read_sales",
    "read_stock",
    "taste_spread",
]
