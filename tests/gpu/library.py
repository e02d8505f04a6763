"""The stand-in's own functions, as device.cpp has them, and its memory as arrays."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_long, c_size_t, c_uint, c_uint64, c_void_p

import numpy as np

OnResolve = ctypes.CFUNCTYPE(
    c_int, c_void_p, c_char_p, c_char_p, c_int, ctypes.POINTER(c_uint), ctypes.POINTER(c_int)
)
OnLaunch = ctypes.CFUNCTYPE(
    c_int, c_int, ctypes.POINTER(c_uint), ctypes.POINTER(c_uint), c_uint, ctypes.POINTER(c_void_p),
    c_int,
)  # fmt: skip
OnTask = ctypes.CFUNCTYPE(c_int, c_long)
OnCapture = ctypes.CFUNCTYPE(None, c_int)
OnHostFunction = ctypes.CFUNCTYPE(None, c_void_p)

_SIGNATURES = {
    "connect": (None, OnResolve, OnLaunch, OnTask, OnCapture),
    "arena": (c_void_p,),
    "written": (c_void_p,),
    "arena_bytes": (c_size_t,),
    "trouble": (c_char_p, c_void_p, c_size_t, c_int),
    "find": (c_int, c_void_p, ctypes.POINTER(c_size_t), ctypes.POINTER(c_size_t)),
    "detail": (None, c_char_p),
    "enqueue": (c_int, c_void_p, c_char_p, c_long),
    "forgotten": (c_long,),
    "message": (c_char_p, c_int),
    "fault": (None, c_char_p, c_int, c_int, c_int),
    "capability": (None, c_int, c_int),
    "memory": (None, c_size_t),
    "order": (None, c_uint64),
    "pause": (None, c_int),
    "log": (c_char_p, c_int),
    "bytes_in_use": (c_size_t, c_int),
    "reset": (None,),
}


class Library:
    """libcuda.so.1 of the stand-in, which is loaded already."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(self._library, f"stand_in_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.base: int = self.arena()  # type: ignore[attr-defined]
        self.size: int = self.arena_bytes()  # type: ignore[attr-defined]
        self.bytes = self._array(self.base)
        # One for each byte: whether anybody has written it
        self.written_bytes = self._array(self.written())  # type: ignore[attr-defined]

    def _array(self, address: int) -> np.ndarray:
        # numpy's ctypes route builds a type a length; the buffer protocol needs none
        return np.frombuffer((ctypes.c_uint8 * self.size).from_address(address), np.uint8)

    def runtime(self) -> ctypes.CDLL:
        """libcudart.so of the stand-in."""
        import torch

        major = (torch.version.cuda or "").partition(".")[0]
        return ctypes.CDLL(f"libcudart.so.{major}")
