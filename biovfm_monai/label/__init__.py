"""Bundles served by MONAI Label (https://github.com/Project-MONAI/MONAILabel), which only `app` needs installed."""

from biovfm_monai.label.choose import farthest_first, uncertainty
from biovfm_monai.label.folder import init_app

__all__ = ["farthest_first", "init_app", "uncertainty"]
