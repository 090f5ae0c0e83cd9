"Face de-identification you can check."
__version__ = "0.1.0"
__all__ = ["Deidentifier", "__version__"]


def __getattr__(name):
    "Import the heavy parts only when they are asked for"
    if name == "Deidentifier":
        from deidnb.pipeline import Deidentifier
        return Deidentifier
    raise AttributeError(f"module 'deidnb' has no attribute {name!r}")
