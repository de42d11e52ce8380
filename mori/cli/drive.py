"""Google Drive on Colab: a path on it before it is mounted is a folder of the machine, which is lost with the machine."""

import os
from collections.abc import Iterable

COLAB = "/content"  # Colab's own folder, where Drive is mounted as `drive`


def unmounted(paths: Iterable[str]) -> list[str]:
    """A mistake for the first of the paths that lies on Drive while it is not mounted, with the line that mounts it."""
    drive = os.path.join(COLAB, "drive")
    if not os.path.isdir(COLAB) or os.path.ismount(drive) and os.path.isdir(os.path.join(drive, "MyDrive")):
        return []
    for path in paths:
        if os.path.commonpath([drive, os.path.realpath(path)]) == drive:
            return [
                f"{path} is on Google Drive, which is not mounted; run this in a cell of the notebook, then this command again: "
                f'from google.colab import drive; drive.mount("{drive}")'
            ]
    return []
