"""Fetches bundles from an object store. A copy on this disk is kept by the bundle's id, a hash of its content."""

from pathlib import Path

import msgspec

from features.errors import BundleError
from features.storage.folders import fetch_folder
from features.storage.location import Remote
from models.bundle.bundle import Bundle, load_bundle
from models.bundle.contents import Manifest

_MANIFEST = "manifest.json"


def fetch_bundle(address: Remote, cache: Path) -> Bundle:
    """Returns the bundle at an address.

    Args:
        address: Address of the bundle, such as `s3://shop/run/publish/bundle`.
        cache: Directory of fetched bundles. A bundle that is there already is not fetched again.

    Raises:
        BundleError: No bundle is at the address, or it is altered.
        StorageError: The store does not answer, or a file of the bundle is missing or altered.
    """
    try:
        manifest = msgspec.json.decode((address / _MANIFEST).read_bytes(), type=Manifest)
        return load_bundle(fetch_folder(address, cache / manifest.id, _MANIFEST))
    except FileNotFoundError as error:
        raise BundleError(
            f"{address / _MANIFEST} is missing: no bundle is there, or its upload is unfinished; send it again"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{address / _MANIFEST}: {error}") from error
