"""Lengths measured without the constant start of the prompts, for kinds of tokenizers and whatever the text is."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from verl.embedding.constant_start import constant_start
from verl.embedding.prompts import PromptRenderer, rationale_messages

SYSTEM = "Read the text, of words."
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
# Adjacent to the text, without special tokens, and with a word before the marker.
ADJACENT = "{% for m in messages %}{{ m.content }}<|im_end|><|im_start|>{% endfor %}"
BARE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant] "
WORD = "{% for m in messages %}{{ m.role }}<|im_start|>{{ m.content }} <|im_end|>\n{% endfor %}assistant<|im_start|>"
MARKERS = ["<|im_start|>", "<|im_end|>"]


def byte_level(add_prefix_space: bool) -> Tokenizer:
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ċ", "Ċ"), ("u", "s"), ("us", "e"), ("use", "r"), ("r", "Ċ")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *map("".join, merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_fallback() -> Tokenizer:
    """Sentencepiece's BPE as Llama 2 has it: a word mark before everything, bytes for what is not in the vocabulary."""
    merges = [("▁", "t"), ("▁t", "he"), ("h", "e"), ("▁", "▁"), ("\n", "\n"), ("r", "\n")]
    tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefghijklmnopqrstuvwxyz\n", *map("".join, merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))


def llama_2() -> Tokenizer:
    backend = byte_fallback()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


def metaspace(scheme: str) -> Tokenizer:
    backend = byte_fallback()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return backend


def unigram() -> Tokenizer:
    pieces = ["<unk>", "▁", "▁the", "the", "us", "er", "▁user", "\n", *"abcdefghijklmnopqrstuvwxyz"]
    backend = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return backend


def wordpiece() -> Tokenizer:
    pieces = ["[UNK]", "the", "##the", "user", "##s", *"abcdefghijklmnopqrstuvwxyz.", *(f"##{c}" for c in "abcdefg")]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def renderer(backend: Tokenizer, template: str, *more: AddedToken, **marker: bool) -> PromptRenderer:
    backend.add_special_tokens([AddedToken(content, normalized=False, **marker) for content in MARKERS])
    backend.add_tokens(list(more))
    ready = PromptRenderer(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template))
    ready.lengths([rationale_messages("many", SYSTEM)] * 100)  # from now on it leaves out the constant start
    return ready


BACKENDS = {
    "byte-level": lambda: byte_level(False),
    "byte-level with a leading space": lambda: byte_level(True),
    "llama 2": llama_2,
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "unigram": unigram,
    "wordpiece": wordpiece,
}
# Found only from the "\n" before the marker on, and only if the text begins with zz.
LONGER = AddedToken("<|im_end|>\n<|im_start|>user\nzz", normalized=False, special=False)
RENDERERS = {
    **{f"{name}, {t}": renderer(build(), template) for name, build in BACKENDS.items()
       for t, template in (("ChatML", CHATML), ("adjacent", ADJACENT), ("word", WORD))},
    "no special tokens": renderer(byte_level(False), BARE),
    "marker strips": renderer(llama_2(), CHATML, rstrip=True, lstrip=True),
    "marker is a word": renderer(byte_level(False), WORD, single_word=True),
    "marker in a longer token": renderer(byte_level(False), CHATML, LONGER),
    "normalized tokens": renderer(wordpiece(), CHATML, AddedToken("the end"), AddedToken("user\nthe", lstrip=True)),
}  # fmt: skip
PIECES = ["zz", "the", "user", "<|im_", "|>", "▁", " ", "\n\n", "\u0301", "\u200b", "é", "🙂", "<0x41>", "\0"]
TEXTS = st.lists(st.text(max_size=8) | st.sampled_from(PIECES + MARKERS), max_size=6).map("".join).filter(str.strip)


def reference(measured: PromptRenderer, text: str) -> int:
    """The whole prompt tokenized by transformers; by `render` where the text has a marker, which then is no token."""
    chat = rationale_messages(text, SYSTEM)
    if any(marker in text for marker in MARKERS):
        return len(measured.render([chat])[0].ids)
    return len(measured.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))


@pytest.mark.parametrize("name", RENDERERS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_every_length_is_that_of_the_whole_prompt(name, texts):
    texts = ["zz", *texts]
    found = RENDERERS[name].lengths([rationale_messages(text, SYSTEM) for text in texts])
    assert found == [reference(RENDERERS[name], text) for text in texts]


@pytest.mark.parametrize("name", RENDERERS)
def test_the_start_is_left_out_where_it_is_certain(name):
    backend = RENDERERS[name].tokenizer.backend_tokenizer
    prefix, suffix = RENDERERS[name].frame(rationale_messages("", SYSTEM))
    characters, tokens = constant_start(backend, prefix, suffix)
    if name in ("no special tokens", "marker is a word", "marker in a longer token"):
        assert (characters, tokens) == (0, 0)
    else:
        assert characters == prefix.rindex("<|im_start|>") > 0
        assert tokens == len(backend.encode(prefix[:characters], add_special_tokens=False))


def test_rows_with_their_own_system_message_are_measured_whole():
    """A start is looked for only where many prompts share it; 99 of these share one, 100 another."""
    measured = RENDERERS["byte-level, ChatML"]
    systems = ["often"] * 100 + ["seldom"] * 99 + ["once"]
    chats = [rationale_messages(f"zz the {i}", system) for i, system in enumerate(systems)]
    expected = [len(prompt.ids) for prompt in measured.render(chats)]
    assert measured.lengths(chats) == expected == measured.lengths(chats[::-1])[::-1]
