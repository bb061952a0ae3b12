"""Caches of diffusers across denoising steps (`enable_cache`), over the blocks of the program that runs.

diffusers hooks what it finds in the lists of blocks: the first block there decides, the last one is remembered. A plan
leaves blocks out, has students in place of others, and takes blocks that are read after the cache was enabled. So hooks
are set on the blocks of the program, in the order in which they run, and set anew where another program runs: nothing
that the former computed is taken then.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from diffusers.hooks import hooks as diffusers_hooks
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from ppcl_rt.model.program import Program

# Names of the configs of caches that work on these models.
_SERVED = (
    "FirstBlockCacheConfig",
    "MagCacheConfig",
    "TaylorSeerCacheConfig",
    "PyramidAttentionBroadcastConfig",
    "FasterCacheConfig",
)


class Caching(nn.Module, CacheMixin):
    """Mixin: `enable_cache`, `disable_cache` and `cache_context` of diffusers, at any plan.

    A cache serves one sampling at a time.

    Attributes:
        one_context: whether the pipelines of a family call it without a `cache_context`, conditional and unconditional
            samples in one batch; a cache then has one state.
    """

    block_lists: ClassVar[tuple[str, ...]]
    one_context: ClassVar[bool] = False
    # Of other mixins.
    catalog: Any
    _program: Callable[..., Program]
    _lists: Mapping[str, nn.ModuleList]

    # The program whose blocks have hooks, these blocks, and what looks before each forward whether it still runs.
    _hooked: tuple[weakref.ref[Program], weakref.WeakSet[nn.Module]] | None = None
    _follower: Any = None
    # What the enclosing `cache_context` was given.
    _context: tuple[str, Mapping[str, Any]] | None = None

    def enable_cache(self, config: Any) -> None:
        """Cache across denoising steps from now on; see diffusers.

        Raises:
            ValueError: a cache is enabled already, this one is for other models, or it finds nothing to skip.
        """
        name = type(config).__name__
        if name not in _SERVED:
            raise ValueError(f"{name} is of no cache for these models: take one of {', '.join(_SERVED)}")
        if self.is_cache_enabled:
            # diffusers says so.
            super().enable_cache(config)
        self._hook(config, self._program())
        self._follower = self.register_forward_pre_hook(type(self)._follow, with_kwargs=True)

    def disable_cache(self) -> None:
        """Cache no longer; see diffusers."""
        if self._follower is not None:
            self._follower.remove()
            self._follower = None
        self._unhook()

    @contextlib.contextmanager
    def cache_context(self, name: str, **more: Any) -> Iterator[None]:
        """Say which call of a denoising step this is, as in diffusers; also to hooks that are set meanwhile."""
        before, self._context = self._context, (name, more)
        try:
            with super().cache_context(name, **more):
                yield
        finally:
            self._context = before
            self._tell_context()

    def noise_of(self, arguments: Mapping[str, Any]) -> torch.Tensor | None:
        """What of a forward's arguments tells denoising steps apart: it falls from one to the next."""
        return arguments.get("timestep")

    def _follow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward: see that the hooks are on the blocks that it runs."""
        arguments = inspect.signature(type(self).forward).bind_partial(self, *args, **kwargs).arguments
        program = self._program(self.noise_of(arguments))
        if self._hooked is None or self._hooked[0]() is not program:
            self._hook_anew(program)

    def _hook_anew(self, program: Program) -> None:
        config, done = self._cache_config, {}
        for manager in self._state_managers():
            # Magnitudes are looked up by denoising step, and those are counted on.
            done |= {name: state.step_index for name, state in manager._state_cache.items() if _counts(state)}
        # The forward that begins here has been given the model's own hook, if there is one: that begins anew, too.
        self._reset_stateful_cache()
        self._unhook()
        self._hook(config, program)
        for manager in self._state_managers():
            for name, step in done.items():
                manager._state_cache[name] = manager._state_cls()
                manager._state_cache[name].step_index = step

    def _hook(self, config: Any, program: Program) -> None:
        """Set the hooks of a cache on the blocks of a program."""
        shown: dict[str, dict[str, nn.Module]] = {path: {} for path in self.block_lists}
        for call in program.calls:
            path, number = self.catalog.architecture.place(call.interval.first)
            shown[path][str(number)] = call.block
        with self._showing(shown):
            try:
                super().enable_cache(config)
            except IndexError as error:
                few = f"{type(config).__name__} needs two blocks or more, the plan runs {len(program.calls)}"
                raise ValueError(f"{few}: set a larger ratio, or disable_cache()") from error
        self._hooked = weakref.ref(program), weakref.WeakSet(call.block for call in program.calls)
        hooks = [hook for module, hook in self._cache_hooks() if module is not self]
        if not hooks:
            self.disable_cache()
            raise ValueError(
                f"{type(config).__name__} finds nothing to skip in {type(self).__name__}: "
                "name its blocks or attention in the identifiers of the config, or take FirstBlockCacheConfig"
            )
        for hook in hooks:
            if hasattr(hook, "block_skip_range") and hasattr(getattr(hook, "state", None), "batch_size"):
                # FasterCache skips the first call, too, where that lies in its timesteps, and has nothing to take.
                hook.state.iteration = hook.block_skip_range
        self._tell_context()

    def _unhook(self) -> None:
        """Take the hooks of a cache off the blocks that have them."""
        blocks = [] if self._hooked is None else list(self._hooked[1])
        shown: dict[str, dict[str, nn.Module]] = {path: {} for path in self.block_lists}
        shown[self.block_lists[0]] = {str(number): block for number, block in enumerate(blocks)}
        with self._showing(shown):
            super().disable_cache()
        self._hooked = None

    @contextlib.contextmanager
    def _showing(self, shown: Mapping[str, Mapping[str, nn.Module]]) -> Iterator[None]:
        """Have the lists of blocks that diffusers looks for hold these."""
        for path, blocks in shown.items():
            self._modules[path] = listed(blocks)
        try:
            yield
        finally:
            self._modules.update(self._lists)

    def _cache_hooks(self) -> Iterator[tuple[nn.Module, Any]]:
        """The hooks of the cache that is enabled, with their modules; diffusers has them in the file of its config."""
        for module in self.modules():
            registry = module.__dict__.get("_diffusers_hook")
            for hook in () if registry is None else registry.hooks.values():
                if type(hook).__module__ == type(self._cache_config).__module__:
                    yield module, hook

    def _state_managers(self) -> Iterable[Any]:
        """What holds the states of the hooks by context; hooks share some."""
        managers = [getattr(hook, "state_manager", None) for _, hook in self._cache_hooks()]
        return {id(manager): manager for manager in managers if manager is not None}.values()

    def _tell_context(self) -> None:
        """Tell the hooks of the cache, if one is enabled, in which context they are."""
        context = self._context or (("inference", {}) if self.one_context else None)
        if context is not None and self.is_cache_enabled:
            name, more = context
            # Releases before 0.42 take a name.
            made = getattr(diffusers_hooks, "CacheContext", lambda name: name)(name, **more)
            for manager in self._state_managers():
                manager.set_context(made)


def _counts(state: Any) -> bool:
    return hasattr(state, "step_index")


def listed(blocks: Mapping[str, nn.Module]) -> nn.ModuleList:
    """A list of modules under the numbers that they have elsewhere; others may be missing."""
    made = nn.ModuleList()
    made.__dict__["_modules"] = dict(blocks)
    return made
