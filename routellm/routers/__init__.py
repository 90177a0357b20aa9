"""Router kinds, one file each, behind one protocol."""

from routellm.routers.base import (
    FitReport,
    Pair,
    Router,
    RouterOptions,
    TrainingBattles,
    make_router,
    router_class,
    router_kinds,
)

__all__ = [
    "FitReport",
    "Pair",
    "Router",
    "RouterOptions",
    "TrainingBattles",
    "make_router",
    "router_class",
    "router_kinds",
]
