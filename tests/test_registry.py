import pytest

from moeprune.errors import EvaluationError
from moeprune.registry import Registry


@pytest.fixture
def registry() -> Registry[int]:
    registry: Registry[int] = Registry("engine", EvaluationError)
    for name, entry in (("vllm", 1), ("plain", 2)):
        registry.register(name, entry)
    return registry


def test_entries_are_found_and_listed_by_name(registry):
    assert list(registry) == ["plain", "vllm"]
    assert registry.get("vllm") == 1
    assert "plain" in registry and "other" not in registry and 3 not in registry


def test_an_unknown_name_raises_the_error_of_the_registry(registry):
    with pytest.raises(EvaluationError) as error:
        registry.get("vlm")
    assert str(error.value) == "unknown engine 'vlm'. Did you mean 'vllm'? Known: plain, vllm."


def test_an_empty_registry_says_so():
    with pytest.raises(EvaluationError) as error:
        Registry("engine", EvaluationError).get("vllm")
    assert str(error.value) == "unknown engine 'vllm'. Known: none."


def test_a_name_is_given_once(registry):
    with pytest.raises(AssertionError, match="engine 'plain' is registered twice"):
        registry.register("plain", 3)
    assert registry.get("plain") == 2
