"""Offline generation: prompts in, outputs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from makeready.engine.conversation import Parsers
from makeready.engine.errors import RequestError
from makeready.engine.feed import Feed, Refused, outputs_of
from makeready.engine.front import Bounds, Front
from makeready.engine.generation_config import told
from makeready.engine.given import (
    Conversation,
    Sampling,
    conversations_of,
    params_of,
    prompts_of,
    spread,
)
from makeready.engine.loop import Engine
from makeready.engine.options import SchedulerOptions
from makeready.engine.output import Output, TokenLogprob
from makeready.engine.planned import Report, plan_of, second_of, shareable
from makeready.engine.reply import Reply
from makeready.engine.sampling import SamplingParams
from makeready.engine.text.formats.base import AUTO
from makeready.engine.text.grammar import Grammars
from makeready.engine.text.tokenizer import Tokenizer
from makeready.graphs.checkpoint.base import Checkpoint, open_checkpoint
from makeready.graphs.executable.load import load_executable
from makeready.graphs.plan.plan import Plan

__all__ = ["LLM", "Output", "RequestError", "SamplingParams", "SchedulerOptions", "TokenLogprob"]

_LOG = logging.getLogger("makeready")


class LLM:
    """A model ready to generate.

    >>> with LLM("path/to/folder_or.gguf", target="cpu") as llm:
    ...     llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_new_tokens=16))[0].text

    Leaving the block, or :meth:`close`, gives all memory back, on the GPU and pinned on the host.

    Args:
        checkpoint: a Hugging Face folder, a GGUF file, or an opened checkpoint.
        plan: a plan, or the folder of one; without it, one is compiled or found in the local cache.
        kv_memory_gib: memory for KV pages; None takes what is free on a GPU, less a reserve, and on the CPU gives
            every row its full context, up to 4 GiB.
        scheduler: how requests share the device.
        chat_template: jinja template to use in place of the model's: its text, the path of a file, or the name of
            one of several that the model has.
        tool_call_parser, reasoning_parser: how the model writes tool calls and reasoning; auto for what its chat
            template tells, none to leave them in the text.
        generation_config: take the model's own sampling values from its generation_config.json for requests
            without sampling parameters; see ``default_sampling``.
        report: told in a sentence what is going on while the model loads, and of what may be not as expected;
            without it the latter goes to the logger ``makeready``.
        progress: told how many of how many parameters are loaded.
        options: fields of :class:`makeready.graphs.planner.compile.Request` for the plan to compile, such as
            ``target``, ``max_rows`` or ``weight_dtype``; none may be given beside ``plan``. ``speculative`` may
            hold the ``checkpoint`` that drafts, which a plan does not: that may be given beside it.

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
        tool_call_parser: str = AUTO,
        reasoning_parser: str = AUTO,
        generation_config: bool = True,
        report: Report | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        **options: Any,
    ) -> None:
        opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
        options, beside = second_of(options)
        self.checkpoint = beside.open(opened)
        parsers = Parsers(tool_call_parser, reasoning_parser)
        scheduler = scheduler or SchedulerOptions()
        self.warn: Report = report or _LOG.warning
        report = report or (lambda sentence: None)
        if plan is None and scheduler.deterministic:
            options = {**options, "deterministic": True}
        self.plan = plan_of(self.checkpoint, plan, options, report)
        scheduler.check(self.plan)  # before anything large is loaded
        if self.plan.options.speculative.forced_acceptance is not None:
            self.warn(
                "drafts count as right by chance (speculative.forced_acceptance): answers are of no use"
            )
        vocabulary = self.plan.config["vocab_size"]
        self.front = Front(
            self.checkpoint,
            Bounds(self.plan.limits, vocabulary, self.plan.steps),
            parsers,
            chat_template=chat_template,
            generation_config=generation_config,
            warn=self.warn,
        )
        if self.tokenizer is not None:
            self.front.constrain = Grammars(self.tokenizer, vocabulary, self.end_ids).made
            for sentence in self.tokenizer.warnings:
                self.warn(sentence)
        if self.generation_defaults:
            self.warn(told(self.generation_defaults))
        shared = shareable(self.plan, scheduler, report)
        executable = load_executable(
            self.plan,
            self.checkpoint,
            kv_bytes=None if kv_memory_gib is None else int(kv_memory_gib * 2**30),
            progress=progress,
            report=report,
        )
        try:
            self.engine = Engine(executable, shared)
        except BaseException:
            executable.close()
            raise

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except Exception:
            # An interruption amid a change leaves sequences that cannot be ended in order; it is what counts.
            if not isinstance(error, KeyboardInterrupt):
                raise

    def close(self) -> None:
        """End what still runs and give all memory back; the model cannot be used any more.

        Raises:
            DriverError: the GPU's driver refused to take something back, as after a fault on the device.
        """
        self.engine.close()

    def _check_open(self) -> None:
        if self.engine.closed:
            raise RequestError("the model is closed; load it again")

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer; None where it has none."""
        return self.front.tokenizer

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """Sampling fields that the model states."""
        return self.front.generation_defaults

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The model's own end tokens."""
        return self.front.end_ids

    @property
    def default_sampling(self) -> SamplingParams:
        """What requests without sampling parameters are sampled with: the model's own values, where it has some.

        ``dataclasses.replace(llm.default_sampling, max_new_tokens=16)`` changes one of them.
        """
        return params_of(None, self.generation_defaults)

    def generate(
        self,
        prompts: str | Iterable[Any] | None = None,
        sampling: Sampling | Sequence[Sampling] = None,
        *,
        token_ids: Iterable[Any] | None = None,
        extra_key: str | Sequence[str] = "",
        priority: int | Sequence[int] = 0,
        add_special_tokens: bool = True,
        on_finish: Callable[[int, Output], None] | None = None,
    ) -> list[Output]:
        """Generate for every prompt, however many there are.

        Args:
            prompts: a text, or several, from anything that gives them one after the other; or
            token_ids: prompts as token ids: lists, or arrays of NumPy or torch. Exactly one of the two.
            sampling: for all prompts, or one for each: parameters; or a dict of their fields, which changes
                :attr:`default_sampling` by these; or None for that as it is.
            extra_key: prompts share cached prefixes only with those of the same key; one, or one for each.
            priority: higher goes first under that policy; one, or one for each.
            add_special_tokens: put bos (and eos) around texts where the tokenizer does.
            on_finish: called with the place in the returned list and the output as each finishes.

        Returns:
            Outputs in the order of the prompts, the ``n`` samples of one next to each other. A request that
            cannot be served comes back with
            ``finish_reason`` "error" and the reason in ``error``; the others run.
        """
        self._check_open()
        given = prompts_of(prompts, token_ids)
        if not isinstance(sampling, Sequence):
            params_of(sampling, self.generation_defaults)  # wrong for one, wrong for all
        asked = zip(
            given,
            spread("sampling", sampling, len(given)),
            spread("extra_key", extra_key, len(given)),
            spread("priority", priority, len(given)),
            [add_special_tokens] * len(given),
            strict=True,
        )
        outputs: dict[int, Output] = {}
        with closing(outputs_of(self.engine, asked, self._made)) as finals:
            for place, output in finals:
                outputs[place] = output
                if on_finish is not None:
                    on_finish(place, output)
        return [outputs[place] for place in range(len(outputs))]

    def _made(self, prompt: Any, sampling: Any, extra_key: Any, priority: Any, special: Any) -> list[Reply]:
        """The replies to a prompt."""
        routing = {"extra_key": extra_key, "priority": priority}
        if isinstance(prompt, Conversation):
            return self.chat_replies(prompt.messages, sampling, **routing, **prompt.template)
        return self.replies(prompt, sampling, **routing, add_special_tokens=special)

    def chat(
        self,
        messages: Iterable[Mapping[str, Any]] | Iterable[Sequence[Mapping[str, Any]]],
        sampling: Sampling | Sequence[Sampling] = None,
        *,
        chat_template: str | Path | None = None,
        add_special_tokens: bool = False,
        **template: Any,
    ) -> list[Output]:
        """Generate the assistant's answer to a conversation, or to each of several.

        Args:
            messages: ``{"role": ..., "content": ...}`` each, or a list of such conversations.
            sampling: for all of them, or one for each; as for :meth:`generate`.
            chat_template: as for the class, for these alone.
            add_special_tokens: put bos around what the template makes, which most templates write themselves.
            template: ``tools``, ``tool_choice`` and ``parallel_tool_calls`` (:func:`.tools.check_tools`), and further
                variables of the chat template, such as ``enable_thinking``.

        Returns:
            As :meth:`generate` does, with ``content``, ``reasoning_content`` and ``tool_calls``. A conversation that
            cannot be rendered comes back with the reason in ``error``, and the others run.
        """
        more = {"chat_template": chat_template, "add_special_tokens": add_special_tokens, **template}
        return self.generate([Conversation(each, more) for each in conversations_of(messages)], sampling)

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling = None,
        *,
        extra_key: str = "",
        priority: int = 0,
        add_special_tokens: bool = True,
        fit: bool = False,
    ) -> Iterator[str]:
        """Yield the text of one sample as it becomes final; the generator's value is the output.

        Arguments are those of :meth:`Front.replies`.

        Raises:
            RequestError, TextError: it cannot be served, or could not go on.
        """
        self._check_open()
        pieces: list[str] = []
        if params_of(sampling, self.generation_defaults).n != 1:
            raise RequestError("a stream is of one sample; use n=1")
        (reply,) = self.replies(
            prompt,
            sampling,
            extra_key=extra_key,
            priority=priority,
            add_special_tokens=add_special_tokens,
            fit=fit,
        )
        reply.on_text = pieces.append
        with closing(Feed[None](self.engine, patient=False)) as feed:
            feed.put(None, lambda: [reply])
            while feed.busy:
                for handed in feed.step():
                    if isinstance(handed, Refused):
                        raise handed.error
                new, pieces[:] = pieces[:], ()
                yield from new
        if reply.error is not None:
            raise RequestError(reply.error)
        return reply.result()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | Path | None = None,
        add_special_tokens: bool = False,
        **template: Any,
    ) -> list[int]:
        """Token ids of a conversation under the model's chat template, or another; see :meth:`chat`."""
        return self.front.rendered(messages, add_special_tokens, chat_template=chat_template, **template)[0]

    def chat_replies(
        self, messages: Sequence[Mapping[str, Any]], sampling: Sampling, **more: Any
    ) -> list[Reply]:
        """:meth:`replies` to a conversation, whose reasoning and tool calls are told apart; see :meth:`chat`."""
        return self.front.chat_replies(messages, sampling, **more)

    def replies(self, prompt: str | Sequence[int], sampling: Sampling, **more: Any) -> list[Reply]:
        """The ``n`` replies to one prompt, checked but not queued; see :meth:`Front.replies`."""
        return self.front.replies(prompt, sampling, **more)
