"""No operator of the ONNX standard is forgotten: each has a rule, or a reason to have none."""

from __future__ import annotations

import onnx.defs

import onnxprune.ops
from onnxprune.ops.registry import RULES

ENGINE = "the interpreter itself handles it"
OPTIONAL = "makes or takes an optional value: what flows in is kept whole"
BODIES = "runs a body: what flows in is kept whole"
STRINGS = "works on text"
TREES = "reads numbered features of a classical model: what flows in is kept whole"
TRAINING = "belongs to training, not to inference"
CACHES = "attention with its own state: what flows in is kept whole"

#: Operators without a rule, and why they need none.
WITHOUT_RULE = {
    ("", "Constant"): ENGINE,
    ("", "Shape"): ENGINE,
    ("", "ImageDecoder"): "its input is a file",
    **{("", name): OPTIONAL for name in ("Optional", "OptionalGetElement", "OptionalHasElement")},
    ("", "SequenceMap"): BODIES,
    **{
        ("", name): STRINGS
        for name in (
            "RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer"
        ).split()
    },
    ("ai.onnx.preview", "FlexAttention"): CACHES,
    **{
        ("ai.onnx.ml", name): TREES
        for name in (
            "Binarizer CastMap CategoryMapper DictVectorizer FeatureVectorizer Imputer "
            "LabelEncoder LinearClassifier LinearRegressor Normalizer OneHotEncoder "
            "SVMClassifier SVMRegressor Scaler TreeEnsemble TreeEnsembleClassifier "
            "TreeEnsembleRegressor ZipMap"
        ).split()
    },
    **{
        ("ai.onnx.preview.training", name): TRAINING
        for name in ("Adagrad", "Adam", "Gradient", "Momentum")
    },
}

#: Operators of ONNX Runtime that it keeps in the standard's domain.
NEIGHBOURS = {("", "SimplifiedLayerNormalization")}


def _standard() -> set[tuple[str, str]]:
    schemas = onnx.defs.get_all_schemas_with_history()
    return {(s.domain, s.name) for s in schemas if s.domain.startswith("ai.onnx") or not s.domain}


def test_every_operator_has_a_rule_or_a_reason() -> None:
    assert onnxprune.ops.interpret_node
    forgotten = _standard() - RULES.keys() - WITHOUT_RULE.keys()
    assert not forgotten, "write a rule, or an entry in WITHOUT_RULE with the reason"


def test_no_rule_is_misspelt() -> None:
    known = _standard()
    ours = {(domain, name) for domain, name in RULES if domain in ("", "ai.onnx.ml")}
    assert not ours - known - NEIGHBOURS
    assert not WITHOUT_RULE.keys() - known
    assert not WITHOUT_RULE.keys() & RULES.keys()


def test_no_operator_has_two_rules_for_one_version() -> None:
    for key, entries in RULES.items():
        assert len({e.since for e in entries}) == len(entries), key
