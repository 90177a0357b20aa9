"""Router kinds, one file each, behind one protocol."""

from routellm.routers.base import (
    ROUTER_MODULES,
    FitReport,
    Pair,
    Router,
    TrainingBattles,
    router_class,
)

__all__ = ["ROUTER_MODULES", "FitReport", "Pair", "Router", "TrainingBattles", "router_class"]
