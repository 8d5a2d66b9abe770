"""Triton's interpreter for the tests: faster, and with programs that run concurrently.

Faster: the interpreter replaces the functions of triton.language by its own at every call inside a kernel, which takes most of
its time. Here it does so once a launch. It checks each integer addition for overflow and ignores the result. Here it does not
check. Facts about types are cached.

Concurrently: the interpreter runs the programs of a launch one after the other, so a program that waits for another would wait
for ever. `together` runs them as threads, one at a time, in random order.
"""

from __future__ import annotations

import dataclasses
import inspect
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter


def patch_once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`_patch_lang` that skips modules which this launch has patched already."""
    patched: set[int] = set()

    class Scope:
        def __init__(self, scope: Any, added: set[int]) -> None:
            self.scope, self.added = scope, added

        def restore(self) -> None:
            patched.difference_update(self.added)
            self.scope.restore()

    def patch_lang(function: Any) -> Any:
        languages = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        added = languages - patched
        if not added:
            return None  # a call inside a kernel: its caller does not restore
        patched.update(added)
        return Scope(patch(function), added)

    return patch_lang


def kept(np_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`_get_np_dtype` with a cache: it builds a table of all types at every call."""
    known: dict[str, Any] = {}

    def get(of: Any) -> Any:
        name = of.scalar.name
        if name not in known:
            known[name] = np_dtype(of)
        return known[name]

    return get


def broadcast_unless_equal(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """`broadcast_impl_value` with a shortcut for blocks of equal shape and for scalars."""

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        of_lhs, of_rhs = ([*side.type.get_block_shapes()] if side.type.is_block() else None for side in (lhs, rhs))
        return (lhs, rhs) if of_lhs == of_rhs else broadcast(self, lhs, rhs)

    return broadcast_impl_value


def parts_kept(init: Callable[..., None]) -> Callable[..., None]:
    """`tensor.__init__` with a cache: most attributes are the same for all tensors of a type."""

    def __init__(self: Any, handle: Any, type: Any) -> None:
        parts = type.__dict__.setdefault("_parts_of_tensors", {})
        if parts:
            self.__dict__.update(parts, handle=handle, type=type)
        else:
            init(self, handle, type)
            parts.update((name, part) for name, part in self.__dict__.items() if name not in ("handle", "type"))

    return __init__


def shapes_kept(init: Callable[..., None]) -> Callable[..., None]:
    """`block_type.__init__` with a cache: there are few types."""
    known: dict[Any, dict[str, Any]] = {}

    def __init__(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *[getattr(size, "value", size) for size in shape])
        if key not in known or element_ty.is_ptr():
            init(self, element_ty, shape)
            known[key] = self.__dict__ | {"_parts_of_tensors": {}}
        else:
            self.__dict__.update(known[key])

    return __init__


def make_quicker() -> None:
    interpreter._patch_lang = patch_once(interpreter._patch_lang)
    interpreter._get_np_dtype = kept(interpreter._get_np_dtype)
    semantic.TritonSemantic.broadcast_impl_value = broadcast_unless_equal(semantic.TritonSemantic.broadcast_impl_value)
    tl.tensor.__init__ = parts_kept(tl.tensor.__init__)
    tl.block_type.__init__ = shapes_kept(tl.block_type.__init__)
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


class Baton:
    """Runs functions as threads, one at a time. At a memory access a thread may pass the baton to another, chosen at random."""

    def __init__(
        self, functions: list[Callable[[], None]], resume: Callable[[int], None], seed: int, odds: float
    ) -> None:
        self.random, self.odds, self.resume = random.Random(seed), odds, resume
        self.turns = [threading.Semaphore(0) for _ in functions]
        self.alive = list(range(len(functions)))
        self.current, self.idle = 0, 0
        self.failure: BaseException | None = None
        self.done = threading.Semaphore(0)
        self.threads = [threading.Thread(target=self._run, args=(i, f), daemon=True) for i, f in enumerate(functions)]

    def run(self) -> None:
        for thread in self.threads:
            thread.start()
        self._wake(self.random.choice(self.alive))
        self.done.acquire()
        if self.failure is not None:
            raise self.failure

    def hand_on(self, *, waiting: bool) -> None:
        """Let another thread run: always if this one waits for others, else with probability `odds`."""
        me = self.current
        self.idle = self.idle + 1 if waiting else 0
        if self.idle > 1000 * len(self.threads):
            raise RuntimeError("the programs of a launch wait for each other for ever")
        if not waiting and self.random.random() > self.odds:
            return
        others = [i for i in self.alive if i != me]
        if others:
            self._wake(self.random.choice(others))
            self.turns[me].acquire()
            if self.failure is not None:
                raise SystemExit
            self.resume(me)

    def _wake(self, index: int) -> None:
        self.current = index
        self.turns[index].release()

    def _run(self, index: int, function: Callable[[], None]) -> None:
        self.turns[index].acquire()
        try:
            if self.failure is None:
                self.resume(index)
                function()
        except SystemExit:
            pass
        except BaseException as error:
            self.failure = error
        self.alive.remove(index)
        if self.alive:
            self._wake(self.random.choice(self.alive))
        else:
            self.done.release()


@contextmanager
def together(seed: int = 0, odds: float = 0.05) -> Iterator[list[int]]:
    """Run all programs of a launch concurrently. Yields a list with the number of programs of each launch.

    Programs switch when one waits and, with probability `odds`, at any load, store or atomic. So for some seed a value that
    is exchanged without a barrier is read too early.
    """
    launches: list[int] = []
    builder = interpreter.interpreter_builder

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        grid = (*self.grid, 1, 1)[:3]
        kwargs = {name: value for name, value in kwargs.items() if name in inspect.signature(self.fn).parameters}
        scope = interpreter._patch_lang(self.fn)
        try:
            named = inspect.getcallargs(self.fn, *args, **kwargs)
            named = {k: v if k in self.constexprs else interpreter._implicit_cvt(v) for k, v in named.items()}
            builder.set_grid_dim(*grid)
            places = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
            launches.append(len(places))
            baton = Baton(
                [lambda: self.fn(**named)] * len(places), lambda i: builder.set_grid_idx(*places[i]), seed, odds
            )

            def switching(function: Callable[..., Any], *, atomic: bool) -> Callable[..., Any]:
                def call(*arguments: Any, **keywords: Any) -> Any:
                    result = function(*arguments, **keywords)
                    baton.hand_on(waiting=atomic)
                    return result

                return call

            with pytest.MonkeyPatch.context() as patch:
                for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw"):
                    function = switching(getattr(builder, name), atomic=name == "create_atomic_rmw")
                    patch.setattr(builder, name, function)
                baton.run()
        finally:
            scope.restore()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", run)
        yield launches
