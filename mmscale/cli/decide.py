"""The layout that `parallel.sp: auto` means, for `check` and `train` alike; every rank of a run must come to the same one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmscale.config.checks import check_config
from mmscale.config.env import Launch
from mmscale.config.llm import llm_sizes
from mmscale.config.schema import Config
from mmscale.config.specs import extra_tokens, media_specs
from mmscale.model.composite import MultimodalLM, skeleton
from mmscale.model.description import describe
from mmscale.parallel.sp.choose import Facts, choose_parallel, rank_bytes_of
from mmscale.parallel.workload import ModelSizes, PartSize, make_workload
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import MediaSpecs


@dataclass(frozen=True, slots=True)
class Device:
    """The machines of a run: processes per node, and bytes of one device (None = unknown)."""

    ranks_per_node: int
    memory_bytes: int | None

    @classmethod
    def of(cls, launch: Launch, device: str) -> Device:
        """The machines on which this process runs. Bytes are whole GiB, so that equal cards count as equal."""
        per_node = launch.ranks_per_node or launch.world_size
        if device == "cpu" or not torch.cuda.is_available():
            return cls(per_node, None)
        total = torch.cuda.get_device_properties(launch.local_rank % torch.cuda.device_count()).total_memory
        return cls(per_node, total >> 30 << 30)


def decide_run(config: Config, launch: Launch) -> tuple[Config, str]:
    """`decide` for a run that is about to start; the model is built as shapes only. Raises ConfigError."""
    if config.parallel.sp != "auto":
        return config, ""
    specs = media_specs(config.model, config.data)
    section = config.model.tokenizer
    added = (*section.add_tokens, *extra_tokens(config.data))
    vocab_size = TextTokenizer.load(section.path, added, section.pad_to_multiple).vocab_size
    with torch.device("meta"):
        model = skeleton(describe(config.model, vocab_size, specs))
    device = Device.of(launch, config.run.device)
    return decide(config, launch.world_size, model_sizes(config, model), specs, device)


def decide(config: Config, world_size: int, sizes: ModelSizes, specs: MediaSpecs, device: Device) -> tuple[Config, str]:
    """The config with `parallel.sp: auto` decided, checked again, and why; others as they are. Raises ConfigError."""
    if config.parallel.sp != "auto":
        return config, ""
    facts = Facts(
        sizes.llm,
        config.data.seq_len,
        config.train.global_batch,
        device.ranks_per_node,
        device_bytes=device.memory_bytes,
        rank_bytes=rank_bytes_of(make_workload(config, world_size, sizes, specs)),
    )
    parallel, reason = choose_parallel(config.parallel, world_size, facts)
    decided = config.model_copy(update={"parallel": parallel})
    check_config(decided, world_size)
    return decided, reason


def model_sizes(config: Config, model: MultimodalLM) -> ModelSizes:
    """The sizes of a model, which may be shapes only, and what of it is trained."""
    llm = model.llm.config
    settings = config.train.parts
    parts = {
        name: PartSize(sum(p.numel() for p in part.parameters()), getattr(settings, name).tune == "full")
        for name, part in model.parts().items()
    }
    return ModelSizes(parts, llm_sizes(llm.to_dict()), int(llm.vocab_size), 1 if llm.tie_word_embeddings else 2)
