"""Self-supervised vision transformers from heterogeneous biomedical images, the MONAI way."""

from importlib.metadata import version

__version__ = version("biovfm-monai")
