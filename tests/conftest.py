"""What every test shares: a strict, offline, eight-device CPU run, and tiny random checkpoints.

Fixtures
========
``rng``
    NumPy generator seeded from the test's own name.
``strict``
    ``with strict(): ...`` makes dtype promotion strict and rank promotion an error. Put it around
    OUR functions in float32 only: ott-jax, optax and `jax.nn.dot_product_attention` in bfloat16
    break under it.
``texts``, ``text_file``
    Small multilingual documents, and a ``.txt`` of them (one document a line).
``config_dict``
    ``config_dict(family="llama", *, tied=False, kv_heads=2, ...)`` -> the dict of a tiny
    ``config.json``.
``tokenizer_folder``
    ``tokenizer_folder("bpe" | "qwen" | "metaspace")`` -> folder of real, tiny tokenizer files.
``tiny_checkpoint``
    ``tiny_checkpoint(family="llama", *, tied=False, kv_heads=2, layers=3, seed=0, ...)`` -> folder
    of a random checkpoint with tokenizer, made without torch by our own writer. Cached for the
    session: READ-ONLY.
``writable_copy``
    ``writable_copy(folder)`` -> a copy under ``tmp_path`` that the test may damage.
``torch_checkpoint``
    ``torch_checkpoint(family="llama", ...)`` -> (folder, torch model in float32 with eager
    attention), made by transformers alone: the independent side of parity. Cached for the session:
    READ-ONLY. Mark the test ``torch``.
``random_batch``
    ``random_batch(cfg, padding="none"|"left"|"right", ...)`` -> `Batch` with rows of different
    lengths.

The default sizes are all different, so that nothing passes because a matrix happens to be square:
hidden 24, 4 heads of 8 (q width 32), 2 kv heads (k width 16), MLP 40, 3 layers, and more vocabulary
rows than tokens.
"""

import contextlib
import json
import os
import pkgutil
import shutil
import zlib
from pathlib import Path

# before anything imports jax, transformers or the hub client
# compiling is most of the time of tiny models; `.ci/run` also tests fully optimised programs
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
_XLA_FLAGS = ["--xla_force_host_platform_device_count=8"]
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1":
    # these two halve the time of compiling; the workers share the cores anyway
    _XLA_FLAGS += [
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
os.environ["XLA_FLAGS"] = " ".join([*_XLA_FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# what a worker, or a process that a test starts, has compiled the others read, and the next run
_COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_COMPILED))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch: the workers share the cores
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and a console reads it once

import jaxtyping
import numpy as np
import pytest
from jaxtyping import install_import_hook
from tiny_models import FAMILY_KEYS, OF_FAMILY, TOKENIZERS, special_tokens, train_tokenizer

_PACKAGE = Path(__file__).parents[1] / "ot_merge_jax"

#: Top-level modules whose annotations are not checked at run time, each with the reason.
UNCHECKED: dict[str, str] = {}

install_import_hook(
    [
        f"ot_merge_jax.{module.name}"
        for module in pkgutil.iter_modules([str(_PACKAGE)])
        if module.name not in UNCHECKED
    ],
    "beartype.beartype",
)

#: Warnings that are not ours to mend, each with the reason. Everything else is an error.
ALLOWED_WARNINGS: dict[str, str] = {
    "ignore:JAXopt is no longer maintained:DeprecationWarning": "ott-jax 0.6 imports jaxopt",
    "ignore:Error (reading|writing) persistent compilation cache entry": "jax writes entries of "
    "its cache in place: another worker may see half of one, and compiles",
    "ignore:invalid escape sequence": "POT 0.9, where the installer did not compile it",
}


def pytest_configure(config):
    """Makes every warning an error, except the listed ones; tidies the compiled programs."""
    from ot_merge_jax.cli import compile_cache

    if "PYTEST_XDIST_WORKER" not in os.environ and _COMPILED.exists():
        compile_cache.tidy(_COMPILED)
    config.addinivalue_line("filterwarnings", "error")
    for pattern in ALLOWED_WARNINGS:
        config.addinivalue_line("filterwarnings", pattern)


#: Rooms whose tests are ``fast``, but for what needs torch, a process or more than a minute.
FAST_ROOMS = {"transport", "models", "merging"}
NOT_FAST = {"slow", "network", "torch", "process"}


def pytest_ignore_collect(collection_path, config):
    """``-m fast`` imports no other room: that would take as long as half of its tests."""
    if config.option.markexpr == "fast" and collection_path.is_file():
        return collection_path.parent.name not in FAST_ROOMS
    return None


@pytest.hookimpl(tryfirst=True)  # before pytest looks at ``-m``
def pytest_collection_modifyitems(config, items):
    """Marks the ``fast`` tests; leaves ``slow`` and ``network`` ones out unless ``-m`` is given."""
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if item.path.parent.name in FAST_ROOMS and not marks & NOT_FAST:
            item.add_marker("fast")
    if config.option.markexpr:
        return
    out = [
        item
        for item in items
        if item.get_closest_marker("slow") or item.get_closest_marker("network")
    ]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
    """Drops compiled programs before they hold all the memory maps that Linux gives a process
    (65530): XLA's compiler crashes there.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def one_plot():
    """Runs of the tests draw one plot: eight take two seconds. The value is all of them."""
    from ot_merge_jax.reports import plots

    makers = plots.MAKERS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "MAKERS", {"norms": makers["norms"]})
        yield makers


@pytest.fixture
def every_plot(one_plot, monkeypatch):
    """For tests of the plots themselves."""
    monkeypatch.setattr("ot_merge_jax.reports.plots.MAKERS", one_plot)


@pytest.fixture
def rng(request):
    """A generator that is the same in every run and different in every test."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def strict():
    """A context manager under which implicit dtype and rank promotion raise."""
    import jax

    @contextlib.contextmanager
    def context():
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            yield

    return context


# ---- texts, tokenizers ----


@pytest.fixture(scope="session")
def texts():
    """Sixty short documents, several scripts, seeded."""
    words = """
        the small target model receives what a larger source model learned from text about rivers
        mountains harbours markets and old songs while nobody counts hours
        perbualan bahasa sungai gunung rumah naïve café übung
        河流 山 市場 песня река 1984 3.14 don't
    """
    words = words.split()
    rng = np.random.default_rng(7)
    return [
        " ".join(rng.choice(words, size=int(rng.integers(6, 30)))) + rng.choice([".", "?", "!"])
        for _ in range(60)
    ]


@pytest.fixture
def text_file(tmp_path, texts):
    """A ``.txt`` file, one document a line."""
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory, texts):
    """``tokenizer_folder(kind)`` -> folder with the files of a kind of `TOKENIZERS`; read-only."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(f"tokenizer-{kind}")
            train_tokenizer(kind, texts).save(str(folder / "tokenizer.json"))
            _, bos, eos = TOKENIZERS[kind]
            settings = {
                "tokenizer_class": "Qwen2TokenizerFast"
                if kind == "qwen"
                else "PreTrainedTokenizerFast",
                "bos_token": bos,
                "eos_token": eos,
                "model_max_length": 512,
                "clean_up_tokenization_spaces": False,
            }
            (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
            (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": eos}))
            (folder / "chat_template.jinja").write_bytes(b"{{ messages[0]['content'] }}\r\n\n")
            made[kind] = folder
        return made[kind]

    return make


# ---- tiny checkpoints ----


@pytest.fixture(scope="session")
def config_dict():
    """Factory of the dict of a tiny ``config.json``, as files on the hub look."""

    def make(
        family="llama",
        *,
        tied=False,
        kv_heads=2,
        head_dim=8,
        heads=4,
        hidden=24,
        intermediate=40,
        layers=3,
        vocab_size=None,
        dtype="float32",
        tokenizer=None,
        **more,
    ):
        """``head_dim=None`` leaves the key out; ``more`` are further keys of the file (None removes
        one).
        """
        from ot_merge_jax.models.families import FAMILIES

        kind = tokenizer or OF_FAMILY.get(family, "bpe")
        tokens, bos, eos = TOKENIZERS[kind]
        ids = {token: place for place, token in enumerate(special_tokens(kind))}
        keys = dict(FAMILY_KEYS[family])
        theta = keys.pop("rope_theta", 1e4)
        config = {
            "architectures": [FAMILIES[family].architecture],
            "attention_dropout": 0.0,
            "bos_token_id": ids.get(bos),
            "dtype": dtype,
            "eos_token_id": ids[eos],
            "head_dim": head_dim,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": 0.02,
            "intermediate_size": intermediate,
            "max_position_embeddings": 512,
            "model_type": family,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
            "tie_word_embeddings": tied,
            "transformers_version": "5.23.0",
            "use_cache": True,
            "vocab_size": vocab_size or (tokens // 16 + 1) * 16,  # padded: more rows than tokens
        }
        config |= keys | more
        return {key: value for key, value in config.items() if value is not None}

    return make


def _random_params(cfg, seed, std):
    """Parameters by the table of specs, in numpy: drawing with JAX compiles once for every shape.

    Norms and biases are not the identity, so that leaving one out is seen.
    """
    from ot_merge_jax.models import specs

    rng = np.random.default_rng(seed)
    leaves = {}
    for spec in specs.param_specs(cfg):
        noise = rng.standard_normal(spec.shape, np.float32)
        centre, width = {"scale": (1.0 - cfg.style.unit_offset, 0.3), "bias": (0.0, 0.3)}.get(
            spec.path.split("/")[-1], (0.0, std)
        )
        leaves[spec.path] = (centre + width * noise).astype(np.float32)
    return specs.unflatten(leaves)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, config_dict, tokenizer_folder):
    """Factory of tiny random checkpoints on disk, torch-free; the folder is shared, so do not write
    into it.
    """
    made = {}

    def make(
        family="llama",
        *,
        seed=0,
        std=0.2,
        drift=0.0,
        max_shard_bytes=None,
        tokenizer=None,
        **config,
    ):
        """Makes (or finds) a checkpoint.

        Args:
            family: A key of `FAMILY_KEYS`.
            seed: Of the weights.
            std: Standard deviation of weights, embedding too; 0.2 gives activations of order one.
            drift: Adds ``drift`` times another random checkpoint's deviations: with the same seed
                and sizes, a "fine-tuned" copy of the ``drift=0`` checkpoint.
            max_shard_bytes: Size of a shard; None: one file.
            tokenizer: A kind of `TOKENIZERS`; None: ``bpe``, and ``qwen`` for qwen2 (the only one
                that transformers leaves alone there).
            **config: See ``config_dict``: tied, kv_heads, head_dim, heads, hidden, layers, ...

        Returns:
            Folder with config, generation config, tokenizer, chat template, LICENSE and weights.
        """
        key = json.dumps(
            [family, seed, std, drift, max_shard_bytes, tokenizer, config], sort_keys=True
        )
        if key in made:
            return made[key]
        import jax

        from ot_merge_jax.io import hf
        from ot_merge_jax.models import families

        kind = tokenizer or OF_FAMILY.get(family, "bpe")
        files = config_dict(family, tokenizer=kind, **config)
        like = tmp_path_factory.mktemp("like")
        (like / "config.json").write_text(json.dumps(files, indent=2) + "\n")
        stop = {key: files[key] for key in ("bos_token_id", "eos_token_id") if key in files}
        (like / "generation_config.json").write_text(json.dumps(stop, indent=2) + "\n")
        (like / "LICENSE").write_text("Made by the tests.\n")
        for file in tokenizer_folder(kind).iterdir():
            shutil.copyfile(file, like / file.name)
        cfg = families.read(files, where="tiny")
        params = _random_params(cfg, seed, std)
        if drift:
            other = _random_params(cfg, 1000 + seed, std)
            params = jax.tree.map(
                lambda leaf, noise: leaf + np.float32(drift) * (noise - noise.mean()), params, other
            )
        folder = tmp_path_factory.mktemp(f"tiny-{family}")
        hf.write_model(folder, params, cfg=cfg, like=like, max_shard_bytes=max_shard_bytes)
        made[key] = folder
        return folder

    return make


@pytest.fixture
def writable_copy(tmp_path):
    """Factory of copies of a folder that the test may change."""

    def make(folder, name="model"):
        return Path(shutil.copytree(folder, tmp_path / name))

    return make


@pytest.fixture(scope="session")
def torch_checkpoint(tmp_path_factory, config_dict):
    """Factory of (folder, torch model), made and saved by transformers alone."""
    made = {}

    def make(family="llama", *, seed=0, std=0.2, **config):
        """See ``config_dict`` for the keywords; the weights are ``N(0, std)``, norms and biases
        lively.
        """
        torch = pytest.importorskip("torch")
        import transformers

        from ot_merge_jax.models.families import FAMILIES

        torch.set_num_threads(1)
        key = json.dumps([family, seed, std, config], sort_keys=True)
        if key in made:
            return made[key]
        files = config_dict(family, **config)
        architecture = files.pop("architectures")[0]
        kind = transformers.AutoConfig.for_model(files.pop("model_type"), **files)
        model = getattr(transformers, architecture)._from_config(kind, attn_implementation="eager")
        model = model.to(torch.float32).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            is_norm = "norm" in name
            centre = 1.0 - FAMILIES[family].style.unit_offset
            tensor.copy_(centre + 0.3 * noise if is_norm else std * noise)
        folder = tmp_path_factory.mktemp(f"torch-{family}")
        model.save_pretrained(folder)
        made[key] = (folder, model)
        return made[key]

    return make


@pytest.fixture(scope="session")
def random_batch():
    """Factory of batches of random tokens."""

    def make(cfg, *, padding="none", lengths=(7, 4, 6), rows=2, seed=0):
        """Makes a batch.

        Args:
            cfg: The model, for its vocabulary.
            padding: Side of the padding; ``none`` makes every sequence as long as the longest.
            lengths: Real tokens of each sequence.
            rows: Rows of each sequence; their positions are real tokens, the last row is the mean.
            seed: Of the tokens.
        """
        import jax.numpy as jnp

        from ot_merge_jax.types import Batch

        rng = np.random.default_rng(seed)
        width = max(lengths)
        tokens = rng.integers(0, cfg.vocab_size, (len(lengths), width))
        mask = np.ones((len(lengths), width), bool)
        if padding != "none":
            for row, length in enumerate(lengths):
                mask[row, : width - length] = padding != "left"
                mask[row, length:] &= padding != "right"
        position = np.stack([rng.choice(np.flatnonzero(row), rows) for row in mask])
        position[:, -1] = -1
        row_id = np.arange(len(lengths) * rows).reshape(len(lengths), rows)
        return Batch(
            jnp.asarray(tokens, jnp.int32),
            jnp.asarray(mask),
            jnp.asarray(position, jnp.int32),
            jnp.asarray(row_id, jnp.int32),
        )

    return make


@pytest.fixture
def unchecked(monkeypatch):
    """Switches the shape checks of the test run off: what a user gets is our own exception."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
