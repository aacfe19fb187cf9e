"""The error of devices."""

from features.errors import TesseraError


class DeviceError(TesseraError):
    """Error of a device that is missing, too small or lost."""
