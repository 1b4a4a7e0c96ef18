"""Streaming, packing, filters' marks and bad input of the corpus."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autointerp.errors import ConfigError, InputError
from autointerp.subject import corpus as module
from autointerp.subject.corpus import Corpus, CorpusConfig, check_tokenizer
from autointerp.subject.stdlib import HELD_OUT, module_of
from tests.tiny import TEXTS, tiny_tokenizer

DOCUMENTS = [TEXTS[0], "", TEXTS[1], "a", TEXTS[2] * 3, "  ", TEXTS[3]]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "corpus.jsonl"
    rows = [{"text": text, "url": f"u{i}", "n": i} for i, text in enumerate(DOCUMENTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def corpus(tokenizer, source, *, mark_template=False, num_embeddings=None, **settings):
    config = CorpusConfig(source=str(source), **({"ctx_len": 8} | settings))
    return Corpus(config, tokenizer, num_embeddings=num_embeddings or len(tokenizer), mark_template=mark_template)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def by_document(contexts):
    """Return the tokens of each document, put together again."""
    documents = {}
    for context in contexts:
        stops = [start for _, start in context.segments[1:]] + [len(context.tokens)]
        for (document, start), stop in zip(context.segments, stops, strict=True):
            documents.setdefault(document, []).extend(context.tokens[start:stop].tolist())
    return documents


class TestPacking:
    @pytest.mark.parametrize("packing", ["concat", "document"])
    @pytest.mark.parametrize("ctx_len", [2, 7, 8, 1000])
    @pytest.mark.parametrize("batch_pieces", [1, 3, 256])
    def test_every_token_once_in_its_document(self, tokenizer, jsonl, packing, ctx_len, batch_pieces):
        found = corpus(tokenizer, jsonl, packing=packing, ctx_len=ctx_len, batch_pieces=batch_pieces)
        contexts = list(found.contexts())
        kept = [text for text in DOCUMENTS if text]
        assert by_document(contexts) == {i: ids(tokenizer, text) for i, text in enumerate(kept)}
        assert all(context.tokens.dtype == np.uint32 and 1 <= len(context.tokens) <= ctx_len for context in contexts)
        if packing == "concat":
            assert all(len(context.tokens) == ctx_len for context in contexts[:-1])
        else:
            assert all(len(context.segments) == 1 for context in contexts)
        rows = [row for context in contexts for row in context.documents]
        assert [row.document for row in rows] == list(range(6)) and [row.source_row for row in rows] == [0, 2, 3, 4, 5, 6]
        assert (found.counts.num_documents, found.counts.num_empty) == (6, 1)
        assert found.counts.num_tokens == sum(len(context.tokens) for context in contexts)

    def test_stops_at_the_first_context_boundary_past_the_limit(self, tokenizer, jsonl):
        found = corpus(tokenizer, jsonl, num_tokens=17)
        assert [len(context.tokens) for context in found.contexts()] == [8, 8, 8]

    def test_again_gives_the_same(self, tokenizer, jsonl):
        found = corpus(tokenizer, jsonl, num_tokens=40)
        first, second = list(found.contexts()), list(found.contexts())
        assert [c.tokens.tolist() for c in first] == [c.tokens.tolist() for c in second] and found.counts.num_tokens == 40


class TestSources:
    def test_parquet_jsonl_and_folders_agree(self, tokenizer, jsonl, tmp_path):
        folder = tmp_path / "folder" / "inner"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"text": DOCUMENTS, "url": ["x"] * len(DOCUMENTS)}), folder / "b.parquet")
        wanted = [context.tokens.tolist() for context in corpus(tokenizer, jsonl).contexts()]
        for source in (folder / "b.parquet", tmp_path / "folder"):
            assert [context.tokens.tolist() for context in corpus(tokenizer, source).contexts()] == wanted

    def test_kept_columns_and_their_types(self, tokenizer, jsonl):
        found = corpus(tokenizer, jsonl, keep_columns=("url", "n"))
        rows = [row for context in found.contexts() for row in context.documents]
        assert rows[1].columns == {"url": "u2", "n": 2}
        assert found.column_types() == {"url": "string", "n": "int64"}

    def test_text_files_with_undecodable_and_hidden_ones(self, tokenizer, tmp_path):
        (tmp_path / "b.txt").write_text("second file\n")
        (tmp_path / "a.md").write_text("first file\n")
        (tmp_path / "c.bin").write_bytes(b"\xff\xfe\x00")
        (tmp_path / "d.txt").write_text("")
        (tmp_path / ".hidden").write_text("no")
        found = corpus(tokenizer, tmp_path)
        contexts = list(found.contexts())
        assert [row.columns["path"] for context in contexts for row in context.documents] == ["a.md", "b.txt"]
        assert (found.counts.num_undecodable, found.counts.num_empty) == (1, 1)
        assert found.column_types() == {"path": "string"}

    def test_long_files_and_rows_come_in_pieces_of_one_document(self, tokenizer, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "_BLOCK_BYTES", 64)
        text = (TEXTS[0] + TEXTS[3]) * 5
        (tmp_path / "long.txt").write_text(text)
        (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}) + "\n")
        (tmp_path / "bad.txt").write_bytes(text.encode() + b"\xff")
        for name in ("long.txt", "rows.jsonl"):
            documents = by_document(corpus(tokenizer, tmp_path / name).contexts())
            assert list(documents) == [0] and tokenizer.decode(documents[0]) == text
        with pytest.raises(InputError, match="1 undecodable"):
            list(corpus(tokenizer, tmp_path / "bad.txt").contexts())

    def test_stdlib_begins_with_what_the_demo_never_saw(self, tokenizer):
        found = corpus(tokenizer, "stdlib", num_tokens=2000, ctx_len=256)
        rows = [row for context in found.contexts() for row in context.documents]
        from pathlib import Path

        assert rows and module_of(Path(rows[0].columns["path"])) in HELD_OUT

    def test_special_tokens_in_a_text_are_text(self, tokenizer, tmp_path):
        (tmp_path / "a.txt").write_text("x <|bos|> y <|end|>")
        (context,) = corpus(tokenizer, tmp_path / "a.txt", ctx_len=64).contexts()
        assert not set(context.tokens.tolist()) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(context.tokens.tolist()) == "x <|bos|> y <|end|>"


MESSAGES = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "return user"}]


class TestChat:
    @pytest.fixture
    def chats(self, tmp_path):
        path = tmp_path / "chat.jsonl"
        rows = [{"m": MESSAGES}, {"m": json.dumps(MESSAGES)}, {"m": None}, {"m": "hello there"}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def test_template_applied_once_without_its_bos(self, tokenizer, chats):
        found = corpus(tokenizer, chats, messages="m", packing="document", ctx_len=64)
        texts = [tokenizer.decode(context.tokens.tolist()) for context in found.contexts()]
        rendered = "<|user|>hello there<|end|><|assistant|>return user<|end|>"
        assert texts == [rendered, rendered, "<|user|>hello there<|end|>"] and found.counts.num_empty == 1

    def test_marks_what_the_template_wrote(self, tokenizer, chats):
        context = next(
            iter(corpus(tokenizer, chats, messages="m", packing="document", ctx_len=64, mark_template=True).contexts())
        )
        content = tokenizer.decode(context.tokens[~context.is_template].tolist())
        assert content == "hello therereturn user"
        assert tokenizer.decode(context.tokens[context.is_template].tolist()) == "<|user|><|end|><|assistant|><|end|>"

    def test_messages_that_are_none(self, tokenizer, tmp_path):
        path = tmp_path / "c.jsonl"
        path.write_text(json.dumps({"m": [1, 2]}) + "\n")
        with pytest.raises(InputError, match=r"row 0 of .*: column 'm' holds list; expected a list of messages"):
            list(corpus(tokenizer, path, messages="m").contexts())

    def test_options_that_do_not_go_together(self, tokenizer, jsonl):
        with pytest.raises(ConfigError, match="needs a corpus of chat messages"):
            corpus(tokenizer, jsonl, mark_template=True)
        plain = tiny_tokenizer()
        plain.chat_template = None
        with pytest.raises(InputError, match="needs a chat template"):
            corpus(plain, jsonl, messages="m")


class TestBadInput:
    def test_no_such_corpus(self, tokenizer, tmp_path):
        with pytest.raises(InputError, match="no such file or folder"):
            corpus(tokenizer, tmp_path / "nowhere.jsonl")

    def test_empty(self, tokenizer, tmp_path):
        with pytest.raises(InputError, match="holds no files"):
            corpus(tokenizer, tmp_path)
        (tmp_path / "a.txt").write_text("")
        with pytest.raises(InputError, match="holds no text: 1 empty and 0 undecodable"):
            list(corpus(tokenizer, tmp_path).contexts())

    def test_a_missing_column(self, tokenizer, jsonl, tmp_path):
        with pytest.raises(InputError, match=r"no column 'txt'; did you mean 'text'\?"):
            list(corpus(tokenizer, jsonl, text_column="txt").contexts())
        pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
        with pytest.raises(InputError, match="no column 'url'"):
            list(corpus(tokenizer, tmp_path / "a.parquet", keep_columns=("url",)).contexts())
        with pytest.raises(ConfigError, match="--keep-columns names a column"):
            corpus(tokenizer, "stdlib", keep_columns=("url",))

    def test_a_column_that_is_no_text(self, tokenizer, jsonl):
        with pytest.raises(InputError, match="column 'n' holds int; expected text"):
            list(corpus(tokenizer, jsonl, text_column="n").contexts())

    def test_lines_that_are_no_json_are_counted(self, tokenizer, jsonl):
        jsonl.write_text(jsonl.read_text() + "{broken\n")
        found = corpus(tokenizer, jsonl)
        list(found.contexts())
        assert found.counts.num_undecodable == 1

    def test_damaged_parquet(self, tokenizer, tmp_path):
        (tmp_path / "a.parquet").write_bytes(b"PAR1nonsense")
        with pytest.raises(InputError, match="cannot be read as parquet"):
            list(corpus(tokenizer, tmp_path / "a.parquet").contexts())

    def test_a_tokenizer_of_another_model(self, tokenizer, jsonl):
        with pytest.raises(InputError, match="token ids up to 399 and the subject has 300 embeddings"):
            corpus(tokenizer, jsonl, num_embeddings=300)

    def test_an_added_token_without_embedding_matters_only_when_it_occurs(self, jsonl, tmp_path):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["Point"])
        check_tokenizer(tokenizer, 400)
        (tmp_path / "a.txt").write_text("nothing of the kind")
        assert list(corpus(tokenizer, tmp_path / "a.txt", num_embeddings=400).contexts())
        with pytest.raises(InputError, match=r"gave token 400 \('Point'\) and the subject has 400 embeddings"):
            list(corpus(tokenizer, jsonl, num_embeddings=400).contexts())

    def test_a_hub_dataset_without_a_hub(self, tokenizer):
        with pytest.raises(InputError, match="no corpus nobody/nothing: no such file or folder here, and the hub"):
            list(corpus(tokenizer, "nobody/nothing").contexts())
