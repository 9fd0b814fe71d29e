"""HellaSwag items of our own."""

import json

# Each is there for a trap: WikiHow's tags, a tag at the end, brackets that are no tag, three blanks, characters
# of several bytes, capitalising ctx_b (which also lowers the rest), U+2028 inside a string, empty texts.
TEXTS = [
    ("Personal Care and Style",
     "[header] How to tie a scarf [title] Fold it once. [step] Lay it flat [substeps]", "",
     ["[substeps] Many people fold it.", "Fold [not too tight] here.", "Throw it  away.", "[title] Eat it."]),
    ("Removing ice from car", "Then, the man writes over the snow.", "then He Scrapes",
     [", the ice away.", "with a café spoon — naïvely.", "his dog.", "   three blanks"]),
    ("Cooking", "A pot of 味噌汁 boils [next] on the stove.", "a woman",
     ["adds 豆腐 to it.", "adds tofu.", "leaves, humming 🎵.", "sings"]),
    ("Playing", "A line\u2028separator stands here.", "",
     ["one", "one two", "one two three", "one two three four"]),
    ("", "", "", ["Nothing came before.", "So what?", "It's fine.", "They'll see."]),
]  # fmt: skip


def make_items(count):
    items = []
    for ind in range(count):
        activity, ctx_a, ctx_b, endings = TEXTS[ind % len(TEXTS)]
        ctx_a += f" And it was take {ind}." * (ind // len(TEXTS))
        context = f"{ctx_a} {ctx_b}".strip()
        items.append(
            {"ind": 7 * ind, "activity_label": activity, "ctx_a": ctx_a, "ctx_b": ctx_b, "ctx": context}
            | {"endings": endings, "label": ind % 4, "split": "val", "source_id": f"own~{ind}"}
        )
    return items


def write_items(path, items):
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    return path
