"""Views: what a reader sees of a picture, its exact inverse, and what it does to an attention map."""

from .base import IndexView, View
from .factorized import Component
from .pixels import PermutationView
from .registry import VIEW_NAMES, Composition, get_views, view_from_metadata

__all__ = ["VIEW_NAMES", "Component", "Composition", "IndexView", "PermutationView", "View"]
__all__ += ["get_views", "view_from_metadata"]
