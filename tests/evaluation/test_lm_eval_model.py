"""Tasks of lm-evaluation-harness on our models: the scores of its own class for torch."""

import json
import sys

import numpy as np
import pytest
import yaml

from ot_merge_jax.data import tokenizers
from ot_merge_jax.errors import InputError, RecipeError
from ot_merge_jax.evaluation import lm_eval_model, lm_eval_tasks
from ot_merge_jax.io.folder import eos_token_ids, open_folder
from ot_merge_jax.io.hf import load_hf

lm_eval = pytest.importorskip("lm_eval")

CHOICES = ["old songs", "market", "1984", "rivers and mountains"]


def write_task(folder, name, records, **config):
    """A local task: YAML beside its records."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")
        },
        "test_split": "test",
        **config,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def mean_of(*metrics):
    return [{"metric": one, "aggregation": "mean", "higher_is_better": True} for one in metrics]


def write_choices(folder, records, name="choices"):
    write_task(
        folder, name, records,
        output_type="multiple_choice", doc_to_text="{{question}}\nAnswer:", doc_to_choice="choices",
        doc_to_target="answer", metric_list=mean_of("acc", "acc_norm"),
    )  # fmt: skip


def write_answers(folder, records, name="answers"):
    write_task(
        folder, name, records,
        output_type="generate_until", doc_to_text="question", doc_to_target="answer",
        generation_kwargs={"until": ["\n", "song"], "max_gen_toks": 12, "do_sample": False},
        metric_list=mean_of("exact_match"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts):
    """A task of each kind: multiple choice, rolling and generation."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [
        {"question": text, "choices": CHOICES[: 2 + n % 3], "answer": n % 2}
        for n, text in enumerate(texts[:12])
    ]
    write_choices(folder, questions)
    documents = [texts[0], " ".join(texts), texts[2]]  # the second is longer than the context
    write_task(
        folder, "rolling", [{"text": text} for text in documents],
        output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="text",
        metric_list=[{"metric": one} for one in ("word_perplexity", "bits_per_byte")],
    )  # fmt: skip
    prompts = [{"question": text, "answer": "songs"} for text in [*texts[20:26], " ".join(texts)]]
    write_answers(folder, prompts)
    return folder


def read(checkpoint):
    cfg, params = load_hf(checkpoint, dtype="float32")
    tokenizer = tokenizers.load_tokenizer(checkpoint)
    return lm_eval_model.Scorer(params, cfg, tokenizer, eos_token_ids(open_folder(checkpoint)))


def ours(checkpoint):
    """Our class for lm-eval."""
    return lm_eval_model.model_class()(read(checkpoint))


def theirs(checkpoint):
    """lm-eval's class for torch."""
    torch = pytest.importorskip("torch")
    import transformers
    from lm_eval.models.huggingface import HFLM

    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)


def run(model, folder, names, **settings):
    """lm-eval itself on a model."""
    from lm_eval.evaluator import evaluate

    return evaluate(
        lm=model,
        task_dict={
            "tasks": lm_eval_tasks.load(names, include_path=folder),
            "groups": {},
            "group_map": {},
        },
        bootstrap_iters=0,
        **settings,
    )


def likelihoods(found, task):
    """Everything the model said in a task, in order."""
    said = sorted(found["samples"][task], key=lambda one: one["doc_id"])
    return [answer for one in said for answer in one["resps"]]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")  # torch's and lm-eval's own
@pytest.mark.parametrize(
    ("family", "is_chat"), [("llama", False), ("llama", True), ("qwen2", False)]
)
def test_scores_are_those_of_torch(family, is_chat, tiny_checkpoint, folder):
    """All three kinds, each document and each metric; llama has a BOS, and qwen2 has none."""
    checkpoint = tiny_checkpoint(family)
    mine, reference = (
        run(
            one, folder, ["choices", "rolling", "answers"],
            apply_chat_template=is_chat, fewshot_as_multiturn=is_chat,
        )
        for one in (ours(checkpoint), theirs(checkpoint))
    )  # fmt: skip
    for name, expected in reference["results"].items():
        numbers = {key: one for key, one in expected.items() if isinstance(one, float)}
        assert len(numbers) >= 1
        assert {key: mine["results"][name][key] for key in numbers} == pytest.approx(
            numbers, rel=1e-4
        )
    both = [likelihoods(found, "choices") for found in (mine, reference)]
    np.testing.assert_allclose(*([one[0][0] for one in found] for found in both), atol=1e-3)
    assert [one[0][1] for one in both[0]] == [one[0][1] for one in both[1]]
    np.testing.assert_allclose(
        *(np.ravel(likelihoods(found, "rolling")) for found in (mine, reference)), rtol=1e-5
    )
    assert likelihoods(mine, "answers") == likelihoods(reference, "answers")
    assert any(text for one in likelihoods(mine, "answers") for text in one)


class Asked:
    """What lm-eval hands to a model."""

    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return ours(tiny_checkpoint("llama"))


def test_a_long_request_loses_its_beginning(model, texts):
    """Of 512 positions the last ones count: words before them change nothing."""
    text = " ".join(texts)
    assert len(model.tok_encode(text)) > 1000
    long, longer = model.loglikelihood(
        [Asked(text, " songs"), Asked("other words before " + text, " songs")]
    )
    assert long == longer
    assert model.loglikelihood([Asked(texts[-1], " songs")])[0] != long


def test_stop_strings_cut(model, texts):
    """A text ends before the first of its stop strings, wherever in a token that is."""
    settings = {"max_gen_toks": 12, "do_sample": False}
    prompts = texts[:5]
    whole = model.generate_until([Asked(one, {**settings, "until": []}) for one in prompts])
    for until in ([whole[0][len(whole[0]) // 2]], ["zzz", whole[1][3:5], whole[2][-4:]]):
        cut = model.generate_until([Asked(one, {**settings, "until": until}) for one in prompts])
        expected = list(whole)
        for one in until:
            expected = [text.split(one)[0] for text in expected]
        assert cut == expected != whole


def test_requests_of_several_settings_keep_their_order(model, texts):
    def asked(until):
        settings = {"max_gen_toks": 12, "do_sample": False}
        return [Asked(texts[n], {**settings, "until": until[n % 2]}) for n in range(5)]

    whole = model.generate_until(asked([[], []]))
    end = whole[1][4]
    together = model.generate_until(asked([[], [end]]))
    assert together == [text.split(end)[0] if n % 2 else text for n, text in enumerate(whole)]
    assert together != whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True, "temperature": 0.7}, "do_sample"),
        ({"temperature": 0.7}, "do_sample"),
        ({"num_beams": 4}, "'num_beams'"),
        ({"max_gen_toks": 512}, "max_gen_toks"),
    ],
)
def test_generation_that_is_not_greedy_is_refused(settings, message, model):
    with pytest.raises(InputError, match=message):
        model.generate_until([Asked("a", {"until": ["\n"]} | settings)])


def test_system_message_that_a_template_refuses_is_left_out(model):
    before = model.tokenizer.chat_template
    model.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[go]{% endif %}"
    )
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    try:
        assert model.apply_chat_template(turns) == "[user]u[go]"
        begun = [*turns[1:], {"role": "assistant", "content": "yes"}]
        assert (
            model.apply_chat_template(begun, add_generation_prompt=False) == "[user]u[assistant]yes"
        )
    finally:
        model.tokenizer.chat_template = before


def test_the_class_is_registered():
    from lm_eval.api.registry import get_model

    assert get_model("ot-merge-jax") is lm_eval_model.model_class()


# ---- tasks that cannot be used ----


@pytest.mark.parametrize("answer", [None, 7, "nothing of these"])
def test_choices_without_a_right_answer(answer, tmp_path):
    good = {"question": "a", "choices": ["b", "c"], "answer": "b"}
    write_choices(tmp_path, [good, good | {"answer": None if answer is None else str(answer)}])
    with pytest.raises(InputError, match="Document 2 of the task choices has no right answer"):
        lm_eval_tasks.load(["choices"], include_path=tmp_path)


def test_answers_without_a_right_answer(tmp_path):
    write_answers(tmp_path, [{"question": "a", "answer": "b"}, {"question": "a", "answer": ""}])
    with pytest.raises(InputError, match="Document 2 of the task answers has no right answer"):
        lm_eval_tasks.load(["answers"], include_path=tmp_path)
    assert set(lm_eval_tasks.load(["answers"], include_path=tmp_path, limit=1)) == {"answers"}


def test_answer_of_a_missing_field(tmp_path):
    write_choices(tmp_path, [{"question": "a", "choices": ["b", "c"]}])
    with pytest.raises(InputError, match="task choices"):
        lm_eval_tasks.load(["choices"], include_path=tmp_path)


def test_unknown_task_names_a_near_one(folder):
    with pytest.raises(RecipeError, match="did you mean 'rolling'"):
        lm_eval_tasks.load(["rollin"], include_path=folder)
    with pytest.raises(RecipeError, match="answers, choices, rolling"):
        lm_eval_tasks.load(["rolling", "zzz"], include_path=folder)


def test_tasks_by_pattern(folder):
    assert set(lm_eval_tasks.load(["*o*"], include_path=folder)) == {"choices", "rolling"}


def test_no_folder_of_tasks(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        lm_eval_tasks.load(["choices"], include_path=tmp_path / "nowhere")


def test_task_that_cannot_be_loaded(tmp_path):
    write_choices(tmp_path, [], name="bad")
    (tmp_path / "bad.jsonl").unlink()
    with pytest.raises(InputError, match="bad cannot be loaded"):
        lm_eval_tasks.load(["bad"], include_path=tmp_path)


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [one for one in sys.modules if one.startswith("lm_eval.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"ot_merge_jax\[eval\]"):
        lm_eval_tasks.load(["arc_easy"])


# ---- differences ----


def outcome(**documents):
    arrays = {
        name: (np.asarray(values, float), np.ones(len(values)))
        for name, values in documents.items()
    }
    return lm_eval_tasks.TaskOutcome(
        {name: s.sum() / n.sum() for name, (s, n) in arrays.items()}, arrays, 20
    )


def test_facts_compare_and_adjust_over_tasks():
    right, wrong = [1] * 18 + [0] * 2, [1] * 9 + [0] * 11
    found = lm_eval_tasks.summary(
        {
            "one": {"a": outcome(acc=right), "b": outcome(acc=wrong)},
            "two": {"a": outcome(acc=right), "b": outcome(acc=right)},
        }
    )
    [pair] = found["one"]["pairs"]
    assert (pair["only_a"], pair["only_b"]) == (9, 0)
    assert pair["difference"] == pytest.approx(9 / 20)
    assert pair["low"] < pair["difference"] < pair["high"]
    assert pair["p"] == pytest.approx(2 / 2**9)
    assert pair["p_holm"] == pytest.approx(2 * pair["p"])
    [none] = found["two"]["pairs"]
    assert (none["difference"], none["p"], none["p_holm"]) == (0, 1, 1)


def test_outcomes_are_those_lm_eval_reports(model, folder):
    """And their documents add up to them."""
    named = lm_eval_tasks.load(["rolling", "choices"], include_path=folder)
    params, cfg, tokenizer, stop = model.model
    found = lm_eval_tasks.run(params, cfg, tokenizer, named, stop=stop, limit=3)
    reference = run(model, folder, ["rolling", "choices"], limit=3)["results"]
    for name, metric in (("rolling", "bits_per_byte"), ("choices", "acc"), ("choices", "acc_norm")):
        sums, sizes = found[name].documents[metric]
        assert len(sums) == found[name].count == 3
        assert found[name].metrics[metric] == reference[name][f"{metric},none"]
        assert sums.sum() / sizes.sum() == pytest.approx(found[name].metrics[metric], rel=1e-6)
    assert "word_perplexity" in found["rolling"].metrics
    assert "word_perplexity" not in found["rolling"].documents  # not a ratio of sums
