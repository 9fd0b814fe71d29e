import gpt2_eval


def test_public_names_are_frozen():
    assert gpt2_eval.__all__ == [
        "HellaSwag",
        "HellaSwagResult",
        "Interrupted",
        "LossResult",
        "Row",
        "RowScore",
        "evaluate_hellaswag",
        "evaluate_loss",
        "load_hellaswag",
        "score_items",
    ]
    for name in gpt2_eval.__all__:
        assert getattr(gpt2_eval, name).__name__ == name


def test_unknown_name():
    assert not hasattr(gpt2_eval, "nanochat")
