"""Configuration: sources and their order, and an error for everything a user can get wrong."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import config_reference
from cluster.config import ClusterConfig, RouterSettings, load_config
from cluster.config_source import Text, all_paths
from cluster.engine.config import EngineConfig
from cluster.errors import ConfigError
from cluster.router.config import RouterConfig

MIB = 1 << 20


def load(tmp_path: Path, text: str, **arguments: object) -> ClusterConfig:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return load_config(path, **arguments)  # type: ignore[arg-type]


def problem(tmp_path: Path, text: str, **arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, **arguments)
    return caught.value.message


def flag(key: str, text: str) -> list[Text]:
    return [("--flag", key, text)]


def test_the_defaults_are_valid_and_an_empty_file_means_them(tmp_path: Path) -> None:
    assert load_config() == ClusterConfig() == load(tmp_path, "") == load(tmp_path, "router:\n# nothing\n")


def test_later_sources_win(tmp_path: Path) -> None:
    text = "router: {port: 1000, host: 127.0.0.2}\ndecode: {replicas: 3}\n"
    environment = {"TANDEM_ROUTER__PORT": "2000", "TANDEM_DECODE__ENGINE__BLOCK_SIZE": "64", "TANDEM_CACHE": "/x"}
    config = load(tmp_path, text, environment=environment, overrides=flag("router.port", "3000"))
    assert config.router.port == 3000
    assert config.router.host == "127.0.0.2"
    assert config.decode.replicas == 3
    assert config.decode.engine.block_size == 64
    assert config.prefill == ClusterConfig().prefill


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("router: {prot: 1}", "router.prot: unknown key; did you mean router.port?"),
        ("roter: {port: 1}", "roter: unknown key; did you mean router?"),
        ("port: 1", "port: unknown key; did you mean router.port or prefill.port or decode.port?"),
        ("decode: {engine: {blocksize: 16}}", "did you mean decode.engine.block_size?"),
        ("zzz: 1", "zzz: unknown key; known here: monolithic, model, router"),
        ("1: 2", "1: unknown key"),
        ("router: 8000", "router: expected a mapping with keys such as `host`, `port`"),
        ("router: {port: abc}", "router.port: expected a whole number, got 'abc' (a text)"),
        ("router: {port: 80.5}", "router.port: expected a whole number, got 80.5 (a number)"),
        ("router: {port: [1]}", "router.port: expected a whole number, got [1] (a list)"),
        ("decode: {replicas: true}", "decode.replicas: expected a whole number, got True (a truth value)"),
        ("decode: {replicas: }", "decode.replicas: expected a whole number, got nothing"),
        ("monolithic: 1", "monolithic: expected true or false, got 1"),
        ("model: {path: 7}", "model.path: expected text, got 7"),
        ("connector: {transport: nccl}", 'connector.transport: expected "nixl" or "loopback", got \'nccl\''),
        ("decode: {engine: {kv_cache_bytes: 2 parsecs}}", "kv_cache_bytes: expected a whole number or null"),
    ],
)
def test_wrong_keys_and_types_are_named(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in problem(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("decode: {replicas: 0}", "decode.replicas: must be between 1 and 64, got 0"),
        ("prefill: {replicas: 0}", "set `monolithic: true`"),
        ("prefill: {replicas: -3}", "got -3"),
        ("router: {port: 70000}", "router.port: must be between 0 and 65,535, got 70,000"),
        ("router: {port: -1}", "router.port: must be between 0"),
        (f"decode: {{replicas: {10**30}}}", "decode.replicas: must be between 1 and 64"),
        ("connector: {lease_s: .nan}", "connector.lease_s: must be between 0.1 and 3,600, got nan"),
        ("connector: {lease_s: .inf}", "connector.lease_s: must be"),
        ("connector: {lease_s: -1}", "connector.lease_s: must be"),
        ("decode: {engine: {block_size: 24}}", "must be a multiple of 16, got 24; the nearest is 32"),
        ("decode: {engine: {kv_cache_bytes: 100}}", "write it with a unit, such as 2GiB"),
        ("decode: {engine: {kv_cache_bytes: 999999999999999TiB}}", "kv_cache_bytes: must be between"),
        ("decode: {engine: {max_batched_tokens: 32, max_num_sequences: 64}}", "is less than max_num_sequences (64)"),
        (
            "decode: {engine: {device: cuda, graph_prompt_rows: 8193}}",
            "decode.engine.graph_prompt_rows: must be between 0 and 8,192, got 8,193; steps with prompts are",
        ),
        ("decode: {engine: {compile_threads: 0}}", "decode.engine.compile_threads: must be between 1 and 64, got 0"),
        ("decode: {engine: {graph_prompt_rows: -1}}", "graph_prompt_rows: must be between 0 and 512, got -1"),
        (
            "decode: {engine: {device: cuda, cuda_graphs: false, graph_prompt_rows: 16}}",
            "graph_prompt_rows: 16 with cuda_graphs false; leave one of them out",
        ),
        ("decode: {engine: {speculation: {method: oracle}}}", 'method: expected "none" or "ngram" or "draft"'),
        (
            "decode: {engine: {speculation: {method: draft}}}",
            "draft with no draft_model; set decode.engine.speculation.d",
        ),
        ("decode: {engine: {speculation: {draft_model: m}}}", "none with a draft_model; set it to draft, or leave"),
        (
            "decode: {engine: {speculation: {num_tokens: 0}}}",
            "num_tokens: must be between 1 and 64, got 0; `method: none`",
        ),
        ("decode: {engine: {speculation: {ngram_min: 5, ngram_max: 4}}}", "ngram_min: 5 is more than ngram_max (4)"),
        ("decode: {engine: {speculation: {ngram: 4}}}", "did you mean decode.engine.speculation.ngram_m"),
        ("prefill: {engine: {speculation: {method: ngram}}}", "a prefill worker draws one token of a request"),
        ("decode: {engine: {device: tpu}}", "decode.engine.device: must be one of cpu, cuda, got 'tpu'"),
        ("router: {host: 'not a host'}", "router.host: 'not a host' is neither an IP address nor a host name"),
        ("router: {host: 'localhost:80'}", "without a port"),
        ("decode: {host: 0.0.0.0}", "security.allow_plaintext_network: true"),
        ("model: {path: ' '}", "model.path: empty"),
        ("model: {path: demo, revision: abc}", "model.revision: only a Hugging Face id"),
        ("router: {write_timeout_s: 0}", "router.write_timeout_s: must be"),
    ],
)
def test_values_out_of_range_are_named_with_the_way_out(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in problem(tmp_path, text)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    lines = problem(tmp_path, "router: {prot: 1, port: x}\nmodle: {}\n").splitlines()
    assert len(lines) == 3
    lines = problem(tmp_path, "router: {port: -1}\ndecode: {replicas: 0}\n").splitlines()
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"router: {port: 1", "not valid YAML"),
        (b"a: b: c", "line 1: not valid YAML"),
        (b"- router\n- decode\n", "expected a mapping with keys such as `model:`, got ['router', 'decode'] (a list)"),
        (b"just words", "expected a mapping"),
        (
            b"router:\n  port: 1\nmodel: {}\nrouter:\n  port: 2\n",
            "key 'router' is given twice, in line 1 and in line 4",
        ),
        (b"router: {port: 1, port: 2}", "key 'port' is given twice"),
        (b"\xff\xfe\x00broken", "not valid YAML"),
        (b"\x00\x01\x02", "not valid YAML"),
        (b"? [a, b]\n: 1\n", "not valid YAML"),
        (b"!!python/object/apply:os.system ['true']", "not valid YAML"),
        (b"[" * 5000, "not valid YAML"),
        (b"#" * (MIB + 1), "is larger than"),
    ],
)
def test_a_file_that_is_no_config_is_said_to_be_none(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert expected in caught.value.message
    assert str(path) in caught.value.message


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config file .*missing.yaml: No such file"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            {"TANDEM_ROUTR__PORT": "1"},
            "environment variable TANDEM_ROUTR__PORT: routr: unknown key; did you mean router?",
        ),
        ({"TANDEM_ROUTER__PORT": "many"}, "environment variable TANDEM_ROUTER__PORT: router.port: expected a whole"),
        ({"TANDEM_ROUTER__": "1"}, "unknown key"),
        ({"TANDEM_DECODE__ENGINE": "1"}, "decode.engine is a section; set one of its keys"),
    ],
)
def test_environment_errors_name_the_variable(environment: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(environment=environment)
    assert expected in caught.value.message


def test_texts_are_converted_to_the_type_of_their_key() -> None:
    texts = [
        ("f", "monolithic", "true"),
        ("f", "decode.engine.kv_cache_bytes", "1.5GiB"),
        ("f", "connector.lease_s", "2"),
    ]
    config = load_config(overrides=[*texts, ("f", "model.served_name", "5")])
    assert config.monolithic is True
    assert config.decode.engine.kv_cache_bytes == 1536 * MIB
    assert config.connector.lease_s == 2.0
    assert config.model.served_name == "5"
    assert load_config(overrides=flag("decode.engine.num_threads", "null")).decode.engine.num_threads is None


def test_monolithic_needs_no_valid_prefill_pool_and_no_private_network() -> None:
    overrides = [("f", "monolithic", "true"), ("f", "prefill.replicas", "0"), ("f", "decode.host", "0.0.0.0")]
    assert load_config(overrides=overrides).monolithic


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=3))
def test_any_value_anywhere_is_accepted_or_refused_by_name(value: object) -> None:
    for path in all_paths(ClusterConfig):
        try:
            load_config(overrides=flag(path, str(value)))
        except ConfigError as error:
            assert path.split(".")[0] in error.message  # noqa: PT017 - most values raise nothing


def test_router_settings_are_those_of_the_router() -> None:
    """Every tuning value of the router can be configured, under its own name and with its own default."""
    given_by_launcher = {
        "model_name",
        "model_path",
        "model_revision",
        "decode",
        "prefill",
        "drain_timeout_s",
        "log_level",
        "log_format",
    }
    router = {f.name: f.default for f in msgspec.structs.fields(RouterConfig) if f.name not in given_by_launcher}
    assert {f.name: f.default for f in msgspec.structs.fields(RouterSettings)} == router


def test_the_reference_is_up_to_date_and_explains_every_key() -> None:
    committed = Path(__file__).parents[2] / "docs" / "config.md"
    assert committed.read_text() == config_reference.render(), "run `make docs`"
    for title, section in config_reference.SECTIONS:
        missing = [name for name, comment in config_reference.field_comments(section).items() if not comment]
        assert not missing, f"{title}: give these keys a comment: {missing}"


@pytest.mark.parametrize(("device", "rows", "sequences"), [("cpu", 32, 32), ("cuda", 300, 300), ("cuda", 2048, 512)])
def test_few_rows_of_a_step_mean_no_more_sequences_unless_they_are_asked_for(
    device: str, rows: int, sequences: int
) -> None:
    asked = EngineConfig(device=device, max_batched_tokens=rows)
    assert asked.limits.max_num_sequences == sequences
    assert EngineConfig(device=device, max_batched_tokens=rows, max_num_sequences=999).limits.max_num_sequences == 999
    assert EngineConfig(device=device, max_num_sequences=0).limits.max_num_sequences == 0  # to be refused by name


def test_steps_with_prompts_are_graphs_unless_graphs_are_off() -> None:
    assert EngineConfig(device="cuda").limits.graph_prompt_rows == 1536
    assert EngineConfig(device="cuda", max_batched_tokens=600).limits.graph_prompt_rows == 600
    assert EngineConfig(device="cuda", cuda_graphs=False).limits.graph_prompt_rows == 0
    assert EngineConfig(device="cuda", graph_prompt_rows=0).limits.graph_prompt_rows == 0
    assert EngineConfig(device="cuda", graph_prompt_rows=4096).limits.graph_prompt_rows == 4096
