"""From a model's description to a model without weights: parameters on the meta device, buffers real.

The weights themselves are streamed by `offload.weights`; nothing here allocates memory in proportion to the model.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedConfig, PreTrainedModel

from offload.adapters import initialise_adapters
from offload.errors import ConfigError

# What is fetched from the hub. Pickled weights are never wanted; `*.py` is added when remote code is allowed.
_METADATA_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "tokenizer*")
# Accepted by every configuration class although it is none of its fields.
_COMMON_KEYS = frozenset(
    {"model_type", "num_labels", "torch_dtype", "name_or_path", "auto_map", "attn_implementation"}
    | {"experts_implementation", "output_attentions", "use_return_dict", "transformers_version"}
)


# Building sets process-wide state, here and in transformers (the default dtype): one thread at a time.
_BUILDING = threading.RLock()


class ModelConfig(Protocol):
    """The `model` section of the configuration, as far as it is read here."""

    @property
    def path(self) -> str | Path | None: ...
    @property
    def architecture(self) -> dict[str, Any] | None: ...
    @property
    def dtype(self) -> str: ...
    @property
    def trust_remote_code(self) -> bool: ...
    @property
    def attn_implementation(self) -> str | None: ...


def build(model_cfg: ModelConfig) -> PreTrainedModel:
    """Make the described model with every parameter on meta and every buffer real, set for training.

    Floating-point parameters have `model_cfg.dtype`; buffers have the values and dtypes they have in a model made in
    memory with that dtype (rotary frequencies stay float32). Tied parameters are one `Parameter` object.
    Raises ConfigError for a wrong key, an unknown model type or class, a missing directory, or an unreachable hub.
    """
    dtype = getattr(torch, model_cfg.dtype)
    directory = locate(model_cfg, weights=False)
    config = _read_config(model_cfg, directory)
    # A random buffer, if a model has one, must not depend on, or disturb, the caller's random numbers.
    with torch.random.fork_rng(devices=[]), parameters_as(_without_memory):
        torch.manual_seed(0)
        model = _instantiate(config, model_cfg, dtype)
    _cast_parameters(model, dtype)
    generation_file = directory / "generation_config.json" if directory else None
    if generation_file and generation_file.is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(directory))
    prepare_for_training(model)
    return model


@contextmanager
def parameters_as(substitute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, a module's new parameters on the CPU are replaced by `substitute(parameter)` as they are registered.

    A parameter registered twice is substituted by the same one, so ties survive. Affects all threads of the process,
    so one thread at a time is let in.
    """
    with _BUILDING:
        yield from _parameters_as(substitute)


def _parameters_as(substitute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    original = nn.Module.register_parameter
    substitutes = WeakIdKeyDictionary()

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type == "cpu":
            if param not in substitutes:
                made = nn.Parameter(substitute(param), requires_grad=param.requires_grad)
                made.__dict__.update(param.__dict__)
                substitutes[param] = made
            param = substitutes[param]
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def prepare_for_training(model: nn.Module) -> None:
    """Switch caches off (a cache written by the forward would corrupt the re-run in backward) and to train mode.

    Adapters that peft left on meta get their first values. The original `use_cache` of each (sub-)configuration is
    remembered for `original_config`. Raises WeightsError for adapters that cannot be initialised without the base.
    """
    before = getattr(model, "offload_use_cache", None)
    if before is None:
        before = {}
        for name, config in _configurations(model.config):  # type: ignore[arg-type]
            if getattr(config, "use_cache", None) is not None:
                before[name] = config.use_cache
        model.offload_use_cache = before  # type: ignore[assignment]
    for module in model.modules():  # encoders and decoders hold copies of the model's configuration
        if isinstance(part := getattr(module, "config", None), PreTrainedConfig):
            for _, config in _configurations(part):
                if getattr(config, "use_cache", None) is not None:
                    config.use_cache = False
    initialise_adapters(model)
    model.train()


def original_config(model: nn.Module) -> PreTrainedConfig:
    """A copy of the model's configuration as it was before `prepare_for_training`."""
    config: Any = copy.deepcopy(model.config)
    before = getattr(model, "offload_use_cache", {})
    for name, part in _configurations(config):
        if name in before:
            part.use_cache = before[name]
    return config


def locate(model_cfg: ModelConfig, weights: bool = True) -> Path | None:
    """The local directory of `model_cfg.path` (None when the model comes from an `architecture`).

    A path that is no directory is taken as a hub id when it looks like one; its configuration, tokenizer and (with
    `weights`) safetensors files are downloaded to the hub cache. Raises ConfigError.
    """
    if model_cfg.path is None:
        if model_cfg.architecture is None:
            raise ConfigError("model.path and model.architecture are both unset: give one of them")
        return None
    text = str(model_cfg.path)
    directory = Path(text).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            hint = ""
            if (directory / "adapter_config.json").is_file():
                hint = "; it holds a peft adapter: give the base model here and attach the adapter in Python"
            raise ConfigError(f"model.path: {directory} has no config.json{hint}")
        return directory
    # "org/name" is a hub id; "./x", "/x", "~x", "a/b/c" and names of existing files can only be local.
    if directory.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1 or not text:
        raise ConfigError(f"model.path: no directory {text!r}; give a Hugging Face model directory or a hub id")
    return _download(text, weights, bool(model_cfg.trust_remote_code))


def _download(repo: str, weights: bool, code: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import errors as hub_errors

    patterns = [*_METADATA_FILES, *(["*.safetensors"] if weights else []), *(["*.py"] if code else [])]
    try:
        # A repository may also carry other frameworks' copies in sub-folders; transformers reads the top level only.
        path = huggingface_hub.snapshot_download(repo, allow_patterns=patterns, ignore_patterns=["*/*"])
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
        raise ConfigError(
            f"model.path: {repo!r} is neither a local directory nor a model on the hub that you may read "
            f"({_first_line(error)}); for a gated or private model run `hf auth login`"
        ) from error
    except Exception as error:  # the hub client raises its own, httpx's and OS errors: all mean it is not reachable
        raise ConfigError(
            f"model.path: {repo!r} is not a local directory, and the hub could not be reached to download it "
            f"({type(error).__name__}: {_first_line(error)}); go online, or download it elsewhere with "
            f"`hf download {repo} --local-dir DIR` and set model.path to DIR"
        ) from error
    if weights and not any(Path(path).glob("*.safetensors")):
        raise ConfigError(
            f"model.path: {repo!r} on the hub has no safetensors weights; pickled ones can run code when opened and "
            "are not used. Look for a converted copy (many repositories have one as a pull request)"
        )
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(f"model.path: {repo!r} on the hub has no config.json, so it is not a transformers model")
    return Path(path)


def _read_config(model_cfg: ModelConfig, directory: Path | None) -> PreTrainedConfig:
    if directory is None:
        assert model_cfg.architecture is not None
        return config_from_architecture(model_cfg.architecture)
    trust = bool(model_cfg.trust_remote_code)
    try:
        return transformers.AutoConfig.from_pretrained(str(directory), trust_remote_code=trust)
    except Exception as error:  # transformers raises ValueError, KeyError, OSError and validation errors of its own
        if not trust and '"auto_map"' in (directory / "config.json").read_text(encoding="utf-8"):
            raise ConfigError(
                f"model.path: {directory} brings Python code of its own, which is not run unless you say so: read its "
                "*.py files, and set model.trust_remote_code to true if you trust them"
            ) from error
        raise ConfigError(f"model.path: {directory}/config.json cannot be used: {_first_line(error)}") from error


def config_from_architecture(architecture: dict[str, Any]) -> PreTrainedConfig:
    """A configuration from a dict of `model_type` and the keyword arguments of its configuration class."""
    known = transformers.CONFIG_MAPPING
    model_type = architecture.get("model_type")
    if model_type is None:
        raise ConfigError("model.architecture: model_type is missing; give for example model_type: llama")
    if model_type not in known:
        raise ConfigError(f"model.architecture.model_type: {model_type!r} is unknown{_nearest(model_type, known)}")
    settings = {key: value for key, value in architecture.items() if key != "model_type"}
    config_class = known[model_type]
    _check_keys(config_class, settings, "model.architecture")
    config: PreTrainedConfig = _construct(config_class, settings, "model.architecture")
    for name in config.architectures or ():
        found = _model_class(name)
        if found is None:
            models = [n for n in dir(transformers) if n.lower().startswith(model_type.replace("_", "")[:4])]
            raise ConfigError(f"model.architecture.architectures: no class {name!r}{_nearest(name, models)}")
        if found.config_class is not None and not isinstance(config, found.config_class):
            raise ConfigError(
                f"model.architecture.architectures: {name} needs model_type {found.config_class.model_type!r}, "
                f"not {model_type!r}"
            )
    return config


def _construct(config_class: type[PreTrainedConfig], settings: dict[str, Any], where: str) -> PreTrainedConfig:
    try:
        return config_class(**copy.deepcopy(settings))
    except Exception as error:  # validation errors come as several types, all with a usable text
        raise ConfigError(f"{where}: {config_class.__name__} refuses it: {' '.join(str(error).split())}") from error


def _check_keys(config_class: type[PreTrainedConfig], settings: dict[str, Any], where: str) -> None:
    """Refuse keys the class does not know; transformers would silently keep them as unused attributes."""
    names = {field.name for field in fields(config_class)}
    valid = names | set(config_class.attribute_map) | _COMMON_KEYS
    doubtful = [key for key in settings if key not in valid and not key.startswith("_")]
    if doubtful:
        with_all = _construct(config_class, settings, where).to_dict()
    for key in doubtful:
        # Older spellings (rope_theta) are no fields but change others, and a few settings (qwen3_moe's head_dim) are
        # read by the model's code without being fields. What does neither is unknown.
        without = _construct(config_class, {k: v for k, v in settings.items() if k != key}, where).to_dict()
        others = {k: v for k, v in with_all.items() if k != key}
        if key in with_all and others == without and not _read_by_code(config_class, key):
            raise ConfigError(f"{where}.{key}: {config_class.__name__} has no such setting{_nearest(key, valid)}")
    for key, part_class in getattr(config_class, "sub_configs", {}).items():
        part = settings.get(key)
        if isinstance(part, dict):
            part_type = str(part.get("model_type"))
            if part_type in transformers.CONFIG_MAPPING and not issubclass(part_class, PreTrainedConfig):
                part_class = transformers.CONFIG_MAPPING[part_type]
            if isinstance(part_class, type) and issubclass(part_class, PreTrainedConfig):
                rest = {k: v for k, v in part.items() if k != "model_type"}
                _check_keys(part_class, rest, f"{where}.{key}")


def _read_by_code(config_class: type[PreTrainedConfig], key: str) -> bool:
    code = Path(inspect.getfile(config_class)).parent.glob("modeling_*.py")
    return any(re.search(rf"\b{re.escape(key)}\b", file.read_text(encoding="utf-8")) for file in code)


def _instantiate(config: PreTrainedConfig, model_cfg: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": dtype}
    if model_cfg.attn_implementation is not None:
        options["attn_implementation"] = model_cfg.attn_implementation
    try:
        return _make(config, bool(model_cfg.trust_remote_code), options)
    except ConfigError:
        raise
    except (ValueError, ImportError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        # What a wrong combination of settings raises inside the model's own constructor.
        raise ConfigError(f"model: {config.model_type} cannot be built: {_first_line(error)}") from error


def _make(config: PreTrainedConfig, trust_remote_code: bool, options: dict[str, Any]) -> PreTrainedModel:
    auto_map = (getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    for name in auto_map:
        if name.startswith("AutoModelFor"):
            remote: PreTrainedModel = getattr(transformers, name).from_config(config, trust_remote_code=True, **options)
            return remote
    for name in (config.architectures or ())[:1]:
        model_class = _model_class(name)
        if model_class is not None:
            return model_class._from_config(config, **options)
    for classes in _classes_by_task(config):
        if type(config) in classes:
            return classes[type(config)]._from_config(config, **options)
    raise ConfigError(
        f"model: {config.model_type} has no class for causal, sequence-to-sequence or masked language modelling; name "
        "the class in config.json or model.architecture: architectures: [SomeModelForSomeTask]"
    )


def _classes_by_task(config: PreTrainedConfig) -> list[Any]:
    """Where to look for a class when the configuration names none: what the architecture was made for comes first."""
    order: list[Any] = [
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_MASKED_LM_MAPPING,
    ]
    if config.is_encoder_decoder:
        order.insert(0, order.pop(1))
    elif getattr(config, "is_decoder", None) is False and type(config) in order[2]:
        order.insert(0, order.pop(2))  # bert and its kin have a causal class too, for when is_decoder is set
    return order


def _without_memory(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _model_class(name: str) -> Any:
    """The transformers model class of that name, or None."""
    value = getattr(transformers, name, None)
    return value if isinstance(value, type) and issubclass(value, PreTrainedModel) else None


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring parameters a model insists on making in another floating dtype (state-space decays, say) to `dtype`."""
    cast: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or not p.is_floating_point() or p.dtype == dtype:
                continue
            if id(p) not in cast:
                cast[id(p)] = nn.Parameter(torch.empty_like(p, dtype=dtype), requires_grad=p.requires_grad)
            module._parameters[name] = cast[id(p)]


def _configurations(config: PreTrainedConfig, prefix: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    yield prefix, config
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield from _configurations(part, f"{prefix}{name}.")


def _nearest(word: str, words: Any) -> str:
    close = difflib.get_close_matches(str(word), [str(w) for w in words], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
