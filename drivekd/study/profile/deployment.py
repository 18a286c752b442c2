"""What a model costs when it answers: memory, time to the first token, tokens a second."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.generation import BaseStreamer

from drivekd.study.measure import (
    MemoryTrace,
    ResidentPeak,
    device_name,
    evaluating,
    now,
    percentile,
    release,
    resident_bytes,
    untouched_random,
)
from drivekd.study.profile.prompt import Prompt
from drivekd.study.profile.sizes import held_kv_bytes, kv_cache_bytes
from drivekd.train.guards import is_out_of_memory
from drivekd.train.teachers import is_quantized


@dataclass(frozen=True)
class Run:
    """What was measured of a model at one batch size.

    Attributes:
        first_token_seconds: Of each round: from inputs on the device to the first token of every
            sequence on the host; vision tower and prefill, not the preparation of pictures.
        decode_seconds: Of each round: from there to the last token.
        token_seconds: All times between two tokens of all rounds.
        kv_bytes: Keys and values that the cache held at the end.
        weight_bytes: Parameters and buffers, as they are in memory.
        peak_bytes: The most memory that weights and generating took together: on a GPU what
            torch's allocator had given out, on a CPU the same beside the weights' own size.
        reserved_bytes: The most that torch's allocator had taken from the GPU; None on a CPU.
        resident_growth_bytes: By how much the process' resident memory grew from before the model
            was loaded to its peak; None on a GPU, or where the system does not tell.
    """

    first_token_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]
    token_seconds: tuple[float, ...]
    kv_bytes: int
    weight_bytes: int
    peak_bytes: int
    reserved_bytes: int | None
    resident_growth_bytes: int | None


@dataclass(frozen=True)
class Deployment:
    """A model at one batch size.

    Attributes:
        model: Its name.
        weights: "checkpoint" or "random".
        parameters: Number of parameters, tied ones once.
        weight_bytes: Their bytes by config and dtype; of quantised weights as they are in memory.
        kv_bytes_per_token: Bytes of keys and values of one more token of one sequence, by the
            config, before any sliding window is full; None for caches of other kinds.
        kv_bytes: The same of the whole batch at its last token.
        dtype: dtype of the weights.
        attention: Attention implementation of the decoder; None where it was not loaded.
        device: The GPU's name, or "cpu" and its threads.
        batch_size: Sequences.
        prompt_tokens: Tokens of each sequence's prompt, image tokens among them.
        image_tokens: Of these the ones that stand for images.
        images: Images in each prompt.
        new_tokens: Tokens that each sequence generates.
        run: What was measured; None where it could not be.
        problem: Why not; None where it was.
    """

    model: str
    weights: str
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int | None
    kv_bytes: int | None
    dtype: str
    attention: str | None
    device: str
    batch_size: int
    prompt_tokens: int
    image_tokens: int
    images: int
    new_tokens: int
    run: Run | None
    problem: str | None

    @property
    def first_token_seconds(self) -> float | None:
        """Median over rounds."""
        return None if self.run is None else percentile(self.run.first_token_seconds, 50)

    @property
    def tokens_per_second(self) -> float | None:
        """Of the whole batch while decoding, after the first token; median over rounds.

        None with a single new token.
        """
        if self.run is None or self.new_tokens < 2:
            return None
        tokens = self.batch_size * (self.new_tokens - 1)
        return tokens / percentile(self.run.decode_seconds, 50)


def profile_model(
    model: Any,
    prompt: Prompt,
    *,
    name: str = "model",
    weights: str = "checkpoint",
    batch_sizes: Sequence[int] = (1,),
    new_tokens: int = 64,
    warmup: int = 1,
    rounds: int = 5,
    memory_before: tuple[int, int | None] | None = None,
) -> list[Deployment]:
    """Let a model generate greedily, a set number of tokens, and measure time and memory.

    Every sequence of a batch has the same prompt. A model that would stop does not: its end tokens
    are never taken. The model's own settings for generating (sampling, penalties, stop strings) do
    not count. Mode, settings and all random generators are afterwards as they were.

    Args:
        model: A transformers model with `generate`, on one device.
        prompt: The prompt.
        name: Name for the result.
        weights: "checkpoint" or "random", for the result.
        batch_sizes: Batch sizes, each at least 1.
        new_tokens: Tokens to generate, at least 1; 2 for a speed of decoding.
        warmup: Rounds that are not timed, at least 1.
        rounds: Rounds that are, at least 1.
        memory_before: (allocated bytes on the device, resident bytes) before the model was loaded;
            None takes the weights' own size for what it took.

    Returns:
        One result for each batch size; one that runs out of memory has a `problem`.

    Raises:
        ValueError: A number is too small.
    """
    numbers = {"new_tokens": new_tokens, "warmup": warmup, "rounds": rounds}
    numbers |= {"batch_sizes": min(batch_sizes, default=0)}
    for argument, value in numbers.items():
        if value < 1:
            raise ValueError(f"{argument} is {value}, wanted at least 1")
    place = model.device
    weight_bytes = _held(model)
    if memory_before is None:
        allocated = torch.cuda.memory_allocated(place) if place.type == "cuda" else 0
        memory_before = (allocated - weight_bytes, resident_bytes())
    results = []
    for size in batch_sizes:
        run, problem = None, None
        try:
            run = _measure(model, prompt, size, new_tokens, warmup, rounds, memory_before)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            problem = f"out of memory: {(str(error).splitlines() or [''])[0]}".removesuffix(": ")
        except _StoppedError as error:
            problem = str(error)
        release(place)
        result = describe(
            model.config,
            prompt,
            name=name,
            weights=weights,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            dtype=model.dtype,
            place=place,
            batch_size=size,
            new_tokens=new_tokens,
            run=run,
            problem=problem,
        )
        results.append(result)
    return results


def describe(
    config: Any,
    prompt: Prompt,
    *,
    name: str,
    weights: str,
    parameters: int,
    dtype: torch.dtype,
    place: torch.device,
    batch_size: int,
    new_tokens: int,
    run: Run | None = None,
    problem: str | None = None,
) -> Deployment:
    """A result, with what follows from the config."""
    cached = prompt.tokens + new_tokens - 1
    return Deployment(
        model=name,
        weights=weights,
        parameters=parameters,
        weight_bytes=run.weight_bytes
        if run is not None and is_quantized(config)
        else parameters * dtype.itemsize,
        kv_bytes_per_token=kv_cache_bytes(config, dtype, tokens=1),
        kv_bytes=kv_cache_bytes(config, dtype, tokens=cached, batch_size=batch_size),
        dtype=str(dtype).removeprefix("torch."),
        attention=config.get_text_config(decoder=True)._attn_implementation,
        device=device_name(place),
        batch_size=batch_size,
        prompt_tokens=prompt.tokens,
        image_tokens=prompt.image_tokens(config),
        images=prompt.images,
        new_tokens=new_tokens,
        run=run,
        problem=problem,
    )


class _StoppedError(Exception):
    """A model made fewer tokens than it should."""


class _TokenTimes(BaseStreamer):  # type: ignore[misc]
    """Notes when each token is on the host; `generate` puts the prompt first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: Tensor) -> None:
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def tokens(self) -> list[float]:
        return self.seconds[1:]


def _measure(
    model: Any,
    prompt: Prompt,
    size: int,
    new_tokens: int,
    warmup: int,
    rounds: int,
    memory_before: tuple[int, int | None],
) -> Run:
    place = model.device
    inputs = {
        key: value.to(place, model.dtype if value.is_floating_point() else None)
        for key, value in prompt.batch(size).items()
    }
    before, resident_before = memory_before
    trace = MemoryTrace() if place.type == "cpu" else None
    if trace is None:
        release(place)
        torch.cuda.reset_peak_memory_stats(place)
    first: list[float] = []
    decode: list[float] = []
    between: list[float] = []
    with untouched_random(), evaluating(model), _plain_generation(model, new_tokens) as generate:
        with ResidentPeak() as resident:
            with contextlib.nullcontext() if trace is None else trace:
                kv_bytes = held_kv_bytes(generate(inputs, None).past_key_values)
            for _ in range(warmup - 1):
                generate(inputs, None)
        for _ in range(rounds):
            times = _TokenTimes()
            begin = now(place)
            generate(inputs, times)
            first.append(times.tokens[0] - begin)
            decode.append(times.tokens[-1] - times.tokens[0])
            between += [b - a for a, b in zip(times.tokens, times.tokens[1:], strict=False)]
    held, growth = _held(model), None
    if resident.bytes is not None and resident_before is not None and trace is not None:
        growth = max(resident.bytes - resident_before, 0)
    if trace is None:
        peak = torch.cuda.max_memory_allocated(place) - before
    else:
        peak = held + max(trace.peaks().values())
    return Run(
        first_token_seconds=tuple(first),
        decode_seconds=tuple(decode),
        token_seconds=tuple(between),
        kv_bytes=kv_bytes,
        weight_bytes=held,
        peak_bytes=int(peak),
        reserved_bytes=torch.cuda.max_memory_reserved(place) if trace is None else None,
        resident_growth_bytes=growth,
    )


@contextlib.contextmanager
def _plain_generation(model: Any, new_tokens: int) -> Iterator[Any]:
    """A greedy `generate` of exactly so many tokens; the model's own settings stay what they are.

    Of these only the special tokens are taken.
    """
    own = model.generation_config
    known = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    settings = transformers.GenerationConfig(
        **{token: copy.copy(getattr(own, token, None)) for token in known},
        do_sample=False,
        num_beams=1,
        use_cache=True,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        return_dict_in_generate=True,
    )
    if settings.pad_token_id is None:
        settings.pad_token_id = 0

    def generate(inputs: dict[str, Tensor], streamer: _TokenTimes | None) -> Any:
        output = model.generate(**inputs, generation_config=settings, streamer=streamer)
        made = output.sequences.shape[1] - inputs["input_ids"].shape[1]
        if made != new_tokens:
            raise _StoppedError(f"it stopped after {made} of {new_tokens} tokens")
        return output

    model.generation_config = settings
    try:
        yield generate
    finally:
        model.generation_config = own


def _held(model: Any) -> int:
    """Bytes of parameters and buffers, each storage's tensor once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
