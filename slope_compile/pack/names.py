"""Names of the files that a packed ONNX gives back: below one folder, whatever the packed file says."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath

MAX_PART = 255  # bytes: what file systems allow
MAX_DEPTH = 32  # folders


def require_file_names(names: list[str]) -> None:
    """Raise unless every name is a plain path below a folder, and none is in another one's way.

    Raises:
        ValueError: If one leaves the folder, is no portable name, or is there twice.
    """
    for name in names:
        parts = name.split("/")
        strange = not name.isprintable() or "\\" in name or PureWindowsPath(name).drive
        if strange or len(parts) > MAX_DEPTH or any(part in ("", ".", "..") or _too_long(part) for part in parts):
            raise ValueError(f"'{_shown(name)}' is no name of a file below a folder")
    folded = [PurePosixPath(name.casefold()) for name in names]  # some file systems tell no Aa from aa
    taken = set(folded)
    if len(taken) != len(names) or any(parent in taken for name in taken for parent in name.parents):
        raise ValueError("two of its files have the same name, or one is named as another one's folder")


def _too_long(part: str) -> bool:
    try:
        return len(part.encode()) > MAX_PART
    except UnicodeEncodeError:  # half of a surrogate pair
        return True


def _shown(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name)[:100]
