"""GPT-2 as a model of lm-evaluation-harness: `simple_evaluate(model=GPT2LM(model), tasks=["sciq"])`."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Unpack

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from gpt2_eval.corpora import windows_of
from gpt2_eval.models import encoder_of
from gpt2_eval.packing import Row
from gpt2_eval.published import short_hash
from gpt2_eval.scoring import ScoringOptions, score_items
from gpt2_model import GPT, generate


class GPT2LM(TemplateLM):  # type: ignore[misc]
    """A GPT with the harness' interface, scored with the options of `score_items`, on all ranks under torchrun.

    Requests with the same context share its computation. https://github.com/EleutherAI/lm-evaluation-harness
    """

    def __init__(self, model: GPT, **options: Unpack[ScoringOptions]) -> None:
        super().__init__()
        self.model, self.options, self.encoder = model, options, encoder_of(model)

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches requests."""
        if self.encoder.is_gpt2 or self.model.tokenizer is None:
            return "gpt2"
        return short_hash(*map(repr, sorted(self.model.tokenizer.files.items())))

    @property
    def eot_token_id(self) -> int:
        """The id that also stands for an empty context."""
        return self.encoder.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text."""
        return self.encoder.begin(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        items = [
            [Row(context, continuation) for _, context, continuation in group]
            for _, group in groupby(requests, key=lambda request: request[1])
        ]
        scored = score_items(self.model, items, **self.options)
        return [(row.logprob, row.greedy) for item in scored for row in item]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, each token scored once."""
        size = self.model.config.block_size
        texts = [
            windows_of(self.tok_encode(request.args[0]), size, size, self.eot_token_id) for request in requests
        ]
        scored = iter(score_items(self.model, [[row] for rows in texts for row in rows], **self.options))
        return [sum(next(scored)[0].logprob for _ in rows) for rows in texts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Write greedily up to a stop string or `max_gen_toks` (256) tokens; a long context loses its start."""
        texts = []
        for request in requests:
            context, options = request.args[0], normalize_gen_kwargs(request.args[1])
            if options["do_sample"]:
                raise ValueError("a task that samples (do_sample) does not run by this bridge: it is greedy")
            new = options["max_gen_toks"]
            room = max(1, self.model.config.block_size - new)
            prompt = (self.tok_encode(context) or [self.eot_token_id])[-room:]
            [row] = generate(self.model, [prompt], max_new_tokens=new, temperature=0, stop=options["until"])
            texts.append(row.text)
        return texts
