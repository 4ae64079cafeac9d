"""Offline generation: prompts in, outputs out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from makeready.engine.errors import RequestError
from makeready.engine.generation_config import sampling_defaults, told
from makeready.engine.loop import Engine
from makeready.engine.options import SchedulerOptions
from makeready.engine.request import Output, Request, TokenLogprob
from makeready.engine.sampling import SamplingParams
from makeready.engine.text.chat import read_template, render_chat
from makeready.engine.text.parts import TextError
from makeready.engine.text.tokenizer import Tokenizer, load_tokenizer
from makeready.graphs import artifact
from makeready.graphs.checkpoint.base import Checkpoint, open_checkpoint
from makeready.graphs.executable.load import load_executable
from makeready.graphs.plan import Plan

__all__ = ["LLM", "Output", "RequestError", "SamplingParams", "SchedulerOptions", "TokenLogprob"]

Report = Callable[[str], None]
T = TypeVar("T")

_LOG = logging.getLogger("makeready")

# Requests that ``generate`` lets wait beside those that run: enough to choose from, and the device need not
# wait until thousands of texts are tokenized.
AHEAD = 1024
# Of these, so many are made a step.
MADE = 32


class LLM:
    """A model ready to generate.

    >>> llm = LLM("path/to/folder_or.gguf", target="cpu")
    >>> llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_new_tokens=16))[0].text

    Args:
        checkpoint: a Hugging Face folder, a GGUF file, or an opened checkpoint.
        plan: a plan, or the folder of one; without it, one is compiled or found in the local cache.
        kv_memory_gib: memory for KV pages; None gives every row its full context, up to 4 GiB.
        scheduler: how requests share the device.
        chat_template: jinja template to use in place of the model's: its text, the path of a file, or the name of
            one of several that the model has.
        generation_config: take the model's own sampling values from its generation_config.json for requests
            without sampling parameters; see ``default_sampling``.
        report: told in a sentence what is going on while the model loads, and of what may be not as expected;
            without it the latter goes to the logger ``makeready``.
        progress: told how many of how many parameters are loaded.
        options: fields of :class:`makeready.graphs.compile.Request` for the plan to compile, such as
            ``target``, ``max_rows`` or ``weight_dtype``; none may be given beside ``plan``.

    Raises:
        CheckpointError, PlanError, UnsupportedModelError, TextError: a sentence that says what is wrong.
    """

    def __init__(
        self,
        checkpoint: str | Path | Checkpoint,
        plan: Plan | str | Path | None = None,
        *,
        kv_memory_gib: float | None = None,
        scheduler: SchedulerOptions | None = None,
        chat_template: str | Path | None = None,
        generation_config: bool = True,
        report: Report | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        **options: Any,
    ) -> None:
        self.checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
        scheduler = scheduler or SchedulerOptions()
        self.warn: Report = report or _LOG.warning
        report = report or (lambda sentence: None)
        if plan is None and scheduler.deterministic:
            options = {**options, "deterministic": True}
        self.plan = _plan(self.checkpoint, plan, options, report)
        scheduler.check(self.plan)  # before anything large is loaded
        self.tokenizer: Tokenizer | None = load_tokenizer(self.checkpoint)
        if chat_template is not None:
            tokenizer = self._tokenizer("chat_template")
            tokenizer.chat_template = read_template(chat_template, tokenizer.chat_template)
        stated = sampling_defaults(self.checkpoint.generation_config) if generation_config else {}
        self.generation_defaults: Mapping[str, Any] = stated
        self._bos_told = False
        for sentence in (
            *(self.tokenizer.warnings if self.tokenizer else ()),
            *([told(stated)] if stated else []),
        ):
            self.warn(sentence)
        self.engine = Engine(
            load_executable(
                self.plan,
                self.checkpoint,
                kv_bytes=None if kv_memory_gib is None else int(kv_memory_gib * 2**30),
                progress=progress,
            ),
            _shareable(self.plan, scheduler, report),
        )

    @property
    def default_sampling(self) -> SamplingParams:
        """What requests without sampling parameters are sampled with: the model's own values, where it has some.

        ``dataclasses.replace(llm.default_sampling, max_new_tokens=16)`` changes one of them.
        """
        return SamplingParams(**self.generation_defaults)

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        token_ids: Sequence[Sequence[int]] | None = None,
        extra_key: str | Sequence[str] = "",
        priority: int | Sequence[int] = 0,
        add_special_tokens: bool = True,
        on_finish: Callable[[int, Output], None] | None = None,
    ) -> list[Output]:
        """Generate for every prompt, however many there are.

        Args:
            prompts: a text, or several; or
            token_ids: prompts as token ids. Exactly one of the two.
            sampling: for all prompts, or one for each; None takes :attr:`default_sampling`.
            extra_key: prompts share cached prefixes only with those of the same key; one, or one for each.
            priority: higher goes first under that policy; one, or one for each.
            add_special_tokens: put bos (and eos) around texts where the tokenizer does.
            on_finish: called with the place in the returned list and the output as each finishes.

        Returns:
            Outputs in the order of the prompts, the ``n`` samples of one next to each other. A request that
            cannot be served comes back with
            ``finish_reason`` "error" and the reason in ``error``; the others run.
        """
        if (prompts is None) == (token_ids is None):
            raise RequestError("give either prompts or token_ids")
        given: Sequence[Any] = (
            token_ids or () if prompts is None else [prompts] if isinstance(prompts, str) else prompts
        )
        asked = zip(
            given,
            _spread("sampling", sampling or None, len(given)),
            _spread("extra_key", extra_key, len(given)),
            _spread("priority", priority, len(given)),
            strict=True,
        )
        outputs: dict[int, Output] = {}
        with closing(self._run(self._made(asked, add_special_tokens))) as finals:
            for place, output in finals:
                outputs[place] = output
                if on_finish is not None:
                    on_finish(place, output)
        return [outputs[place] for place in range(len(outputs))]

    def _made(
        self, asked: Iterable[tuple[Any, SamplingParams | None, str, int]], add_special_tokens: bool
    ) -> Iterator[Request | Output]:
        """The requests of all prompts; for a prompt that cannot be served, the outputs that say why."""
        for prompt, params, extra_key, priority in asked:
            try:
                yield from self.requests(
                    prompt,
                    params,
                    extra_key=extra_key,
                    priority=priority,
                    add_special_tokens=add_special_tokens,
                )
            except (RequestError, TextError) as error:
                yield from [Output.refused(str(error))] * (1 if params is None else params.n)

    def _run(self, made: Iterator[Request | Output]) -> Generator[tuple[int, Output], None, None]:
        """Run requests as there is room for them; yields places and outputs as they are final."""
        places: dict[Request, int] = {}
        numbered = enumerate(made)
        try:
            while True:
                yield from self._feed(numbered, places)
                if not places and self.engine.room:
                    return
                for request in self.engine.step():
                    if request in places:
                        yield places.pop(request), request.result()
        finally:
            for request in places:
                self.engine.abort(request)

    def _feed(
        self, made: Iterator[tuple[int, Request | Output]], places: dict[Request, int]
    ) -> Iterator[tuple[int, Output]]:
        """Queue further requests; yields those that are refused."""
        rows, fed = self.engine.limits.max_rows, 0
        while self.engine.room and (len(places) < rows or (fed < MADE and len(places) < rows + AHEAD)):
            place, request = next(made, (0, None))
            if request is None:
                return
            fed += 1
            if isinstance(request, Request):
                try:
                    self.engine.submit(request)
                    places[request] = place
                    continue
                except RequestError as error:
                    request = Output.refused(str(error))
            yield place, request

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling: SamplingParams | None = None,
        *,
        chat_template: str | Path | None = None,
        add_special_tokens: bool = False,
        **template: Any,
    ) -> list[Output]:
        """Generate the assistant's answer to a conversation, or to each of several.

        Args:
            messages: ``{"role": ..., "content": ...}`` each, or a list of such conversations.
            sampling: for all of them; None takes :attr:`default_sampling`.
            chat_template: as for the class, for these alone.
            add_special_tokens: put bos around what the template makes, which most templates write themselves.
            template: further variables of the chat template, such as ``tools`` or ``enable_thinking``.
        """
        several = messages if messages and not isinstance(messages[0], Mapping) else [messages]
        more: dict[str, Any] = {
            "chat_template": chat_template,
            "add_special_tokens": add_special_tokens,
            **template,
        }
        return self.generate(token_ids=[self.render(m, **more) for m in several], sampling=sampling)  # type: ignore[arg-type]

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        extra_key: str = "",
        priority: int = 0,
        add_special_tokens: bool = True,
        fit: bool = False,
    ) -> Iterator[str]:
        """Yield the text of one sample as it becomes final; the generator's value is the output.

        Arguments are those of :meth:`requests`.

        Raises:
            RequestError, TextError: it cannot be served, or could not go on.
        """
        pieces: list[str] = []
        if sampling is not None and sampling.n != 1:
            raise RequestError("a stream is of one sample; use n=1")
        (request,) = self.requests(
            prompt,
            sampling,
            extra_key=extra_key,
            priority=priority,
            add_special_tokens=add_special_tokens,
            fit=fit,
        )
        request.on_text = pieces.append
        self.engine.submit(request)
        try:
            while not request.done:
                self.engine.step()
                new, pieces[:] = pieces[:], ()
                yield from new
        finally:
            self.engine.abort(request)
        if request.error is not None:
            raise RequestError(request.error)
        return request.result()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | Path | None = None,
        add_special_tokens: bool = False,
        **template: Any,
    ) -> list[int]:
        """Token ids of a conversation under the model's chat template, or another; see :meth:`chat`."""
        tokenizer = self._tokenizer("chat")
        source = tokenizer.chat_template
        if chat_template is not None:
            source = read_template(chat_template, source)
        text = render_chat(source, messages, **{**tokenizer.special_tokens, **template})
        return self._encode(text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        tokenizer = self._tokenizer("text")
        ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
        bos = tokenizer.bos_id
        if bos is not None and ids[:2] == [bos, bos] and not self._bos_told:
            self._bos_told = True
            self.warn(
                f"a prompt begins with {tokenizer.bos_token} and the tokenizer adds another; "
                "add_special_tokens=false leaves that out"
            )
        return ids

    def requests(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None,
        *,
        extra_key: str = "",
        priority: int = 0,
        add_special_tokens: bool = True,
        fit: bool = False,
    ) -> list[Request]:
        """The ``n`` requests of one prompt, checked but not queued; see :meth:`generate` for the rest.

        Args:
            fit: lower ``max_new_tokens`` to what the context has room for; as without ``sampling``.

        Raises:
            RequestError, TextError: the prompt or the parameters are beyond what the plan allows.
        """
        vocabulary = self.plan.config["vocab_size"]
        ids = self._encode(prompt, add_special_tokens) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise RequestError("the prompt is empty; give at least one token")
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocabulary:
                raise RequestError(f"token id {token!r} of the prompt is not from 0 to {vocabulary - 1}")
        if sampling is None:
            sampling, fit = self.default_sampling, "max_new_tokens" in self.generation_defaults
        if fit:
            room = max(1, self.plan.limits.context_len - len(ids))
            sampling = dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        sampling.check(self.plan.limits, vocabulary)
        if sampling.logprob_start_len >= len(ids):
            raise RequestError(
                f"logprob_start_len={sampling.logprob_start_len} is beyond the prompt's {len(ids)} tokens; lower it"
            )
        if self.tokenizer is None and (sampling.stop or sampling.stop_regex):
            raise RequestError(
                "stop strings need a tokenizer, and the checkpoint has none; use stop_token_ids"
            )
        ends = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            ends |= frozenset(self.end_ids)
        if sampling.min_new_tokens and len(ends) > self.plan.limits.max_stop_ids:
            raise RequestError(
                f"min_new_tokens holds back {len(ends)} end tokens, the plan allows "
                f"{self.plan.limits.max_stop_ids}; give fewer stop_token_ids"
            )
        return [
            Request(ids, sampling, seed, ends, self.tokenizer, salt=extra_key, priority=priority)
            for seed in map(sampling.seed, range(sampling.n))
        ]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The model's own end tokens: the tokenizer's, or the config's where there is none."""
        if self.tokenizer is not None:
            return self.tokenizer.eos_ids
        named = self.checkpoint.generation_config.get("eos_token_id", self.plan.config.get("eos_token_id"))
        if named is None:
            return ()
        return tuple(named) if isinstance(named, list) else (named,)

    def _tokenizer(self, purpose: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(
                f"{purpose} needs a tokenizer, and {self.checkpoint.path} has none; give prompts as token_ids"
            )
        return self.tokenizer


def _plan(
    checkpoint: Checkpoint, plan: Plan | str | Path | None, options: dict[str, Any], report: Report
) -> Plan:
    if plan is not None:
        if options:
            raise RequestError(
                f"{', '.join(sorted(options))} cannot be chosen for a plan that is already compiled; "
                "leave them out, or leave out plan"
            )
        return plan if isinstance(plan, Plan) else artifact.load(plan)
    # The planner needs torch; a plan that is ready does not.
    from makeready.graphs.compile import Request as PlanRequest
    from makeready.graphs.compile import compile_plan
    from makeready.graphs.plan_cache import cached_plan

    try:
        request = PlanRequest(**options)
    except TypeError as error:
        raise RequestError(f"there is no such plan option: {error}") from None
    made, folder, found = cached_plan(checkpoint, request, lambda: compile_plan(checkpoint, request))
    report(f"plan {'found in' if found else 'compiled to'} {folder}")
    return made


def _shareable(plan: Plan, options: SchedulerOptions, report: Report) -> SchedulerOptions:
    """The options, without the prefix cache where keys depend on more than the tokens before them."""
    operands = {
        name
        for program in plan.programs.values()
        for launch in program.launches
        if launch.op != "sample"
        for name in launch.operands.values()
    }
    if not options.prefix_cache or "prompt_len" not in operands:
        return options
    # Dynamic rotary scaling goes by the length of the prompt: equal beginnings have different keys.
    report("prefixes are not shared: the model's position encoding depends on the length of the prompt")
    return dataclasses.replace(options, prefix_cache=False)


def _spread(name: str, value: T | Sequence[T], count: int) -> Sequence[T]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count  # type: ignore[list-item]
    if len(value) != count:
        raise RequestError(f"{len(value)} values of {name} were given for {count} prompts; give one for each")
    return value
