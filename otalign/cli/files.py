"""Reading saved arrays, and saving pictures."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, as_input_error, first_line

SUFFIXES = (".npy", ".npz", ".pt", ".pth")


def read(path: str) -> dict[str, Tensor]:
    """The arrays of a file by name, in natural order. Arrays of a list have their numbers as names; a single array has "".

    No code in the file is executed: pickled objects are refused, and `torch.load` gets `weights_only=True`.

    Raises:
        InputError: for a file that is missing, damaged, empty, or not arrays of numbers.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a file {', '.join(SUFFIXES)}")
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        held = _numpy(path) if suffix in (".npy", ".npz") else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: {first_line(error)}") from error
    except Exception as error:  # many types; some messages advise to load unsafely, so they are not shown
        raise InputError(
            f"{path}: cannot be read as {suffix}: damaged, or more than plain arrays ({type(error).__name__})"
        ) from error
    if not isinstance(held, (dict, list, tuple)):
        held = {"": held}
    if not held:
        raise InputError(f"{path}: there is no array in it")
    named = held if isinstance(held, dict) else dict(enumerate(held))
    found = {str(name): _tensor(f"{path}[{name}]" if len(named) > 1 else path, a) for name, a in named.items()}
    return {name: found[name] for name in sorted(found, key=natural)}


def natural(name: str) -> list[str | int]:
    """A sort key with which layer_2 comes before layer_10."""
    parts = re.split("([0-9]+)", name)
    return [int(part) if odd % 2 else part for odd, part in enumerate(parts)]


def points(path: str) -> Tensor:
    """The single array of a file as floats `(N, D)`. It must not be empty, and all its entries must be finite."""
    values = floats(_only(path))
    if values.dim() != 2 or 0 in values.shape:
        raise InputError(f"{path}: expected an array (N, D) that is not empty, got {tuple(values.shape)}")
    finite = values.isfinite().all(1)
    if not finite.all():
        raise InputError(f"{path}: NaN or infinity in row {int((~finite).nonzero()[0])} (from 0)")
    return values


def lengths(path: str) -> Tensor:
    """The single array of a file as lengths `(B,)` int64."""
    values = _only(path)
    if values.is_floating_point() or values.dim() != 1:
        raise InputError(f"{path}: expected integers (B,), got {values.dtype} {tuple(values.shape)}")
    return values.long()


def layers(path: str) -> dict[int, Tensor]:
    """The states of a file by layer, each `(B, N, D)`.

    The file holds one array `(L, N, D)` of one item or `(L, B, N, D)`; or an array for each layer, `(N, D)` or `(B, N, D)`. The
    number of a layer is the last number in its name; if names have no numbers, or share one, it is the array's place.
    """
    found = {name: floats(values) for name, values in read(path).items()}
    if len(shapes := {tuple(values.shape) for values in found.values()}) > 1:
        raise InputError(f"{path}: expected layers of one shape, got {', '.join(map(str, sorted(shapes)))}")
    (shape,) = shapes
    if _is_stack(found, len(shape)):
        (stack,) = found.values()
        return dict(enumerate(stack if len(shape) == 4 else stack[:, None]))
    if len(shape) not in (2, 3):
        forms = "(L, N, D) or (L, B, N, D), or (N, D) or (B, N, D) for each layer"
        raise InputError(f"{path}: expected {forms}, got {shape}")
    numbered = zip(_numbers(list(found)), found.values(), strict=True)
    return {number: values if len(shape) == 3 else values[None] for number, values in sorted(numbered, key=_first)}


def floats(values: Tensor) -> Tensor:
    """Integers as float32; floats unchanged."""
    return values if values.is_floating_point() else values.float()


def _is_stack(found: dict[str, Tensor], axes: int) -> bool:
    """True if one array holds all layers: it has four axes, or three and a name without a number."""
    if len(found) > 1:
        return False
    (name,) = found
    nameless = name == "arr_0" or not re.search("[0-9]", name)
    return axes == 4 or (axes == 3 and nameless)


def _first(pair: tuple[int, Tensor]) -> int:
    return pair[0]


def _numbers(names: list[str]) -> list[int]:
    numbers = [int(digits[-1]) for name in names if (digits := re.findall("[0-9]+", name))]
    return numbers if len(set(numbers)) == len(names) else list(range(len(names)))


def _only(path: str) -> Tensor:
    found = read(path)
    if len(found) > 1:
        raise InputError(f"{path}: expected one array, got {len(found)}: {', '.join(list(found)[:5])}")
    (values,) = found.values()
    return values


def _numpy(path: str) -> Any:
    import numpy as np

    held = np.load(path, allow_pickle=False)
    if isinstance(held, np.ndarray):
        return _from_numpy(held)
    with held:
        return {name: _from_numpy(held[name]) for name in held.files}


def _from_numpy(array: Any) -> Any:
    """A tensor in native byte order; arrays of other types than numbers stay as they are."""
    if array.dtype.kind not in "fiu":
        return array
    float_type = {2: "float16", 4: "float32"}.get(array.dtype.itemsize, "float64")
    return torch.from_numpy(array.astype(float_type if array.dtype.kind == "f" else "int64"))


def _tensor(name: str, array: Any) -> Tensor:
    if not isinstance(array, Tensor) or array.layout != torch.strided or array.is_nested:
        raise InputError(f"{name}: expected numbers in a dense array, got {_kind(array)}")
    narrow = array.is_floating_point() and array.dtype.itemsize < 2
    if narrow or array.is_complex() or array.is_quantized or array.dtype == torch.bool:
        raise InputError(f"{name}: expected floats or integers, got {array.dtype}")
    return array.detach()


def _kind(held: Any) -> str:
    return f"an array of {held.dtype}" if hasattr(held, "dtype") else type(held).__name__


# Pictures and results --------------------------------------------------------------------------------------------------


def expect_writable(path: str | None, suffixes: tuple[str, ...] = ()) -> None:
    """Raise an InputError for a path that cannot be written, before the work starts."""
    if path is None:
        return
    if suffixes and Path(path).suffix.lower() not in suffixes:
        raise InputError(f"{path}: expected a name that ends in one of {', '.join(suffixes)}")
    if not Path(path).parent.is_dir():
        raise InputError(f"{path}: the folder {Path(path).parent} does not exist")


def expect_plot(path: str | None) -> None:
    """Raise an InputError for a picture that cannot be drawn or saved, before the work starts."""
    if path is None:
        return
    with as_input_error(ImportError, about="--plot needs matplotlib, pip install otalign[plot]"):
        importlib.import_module("matplotlib")
        from matplotlib.backend_bases import FigureCanvasBase
    known = tuple(f".{name}" for name in FigureCanvasBase.get_supported_filetypes())
    expect_writable(path, known)


def save_figure(ax: Any, path: str) -> None:
    """Save the figure of these axes, in the format of the file name's suffix."""
    with as_input_error(OSError, ValueError, about=path):
        ax.figure.savefig(path, dpi=150)
