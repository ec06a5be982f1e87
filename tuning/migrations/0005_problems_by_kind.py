"""Problems of earlier uploads, one entry a row, become one entry a kind, as uploads now keep them."""

from django.db import migrations


def by_kind(apps, _schema):
    datasets = apps.get_model("tuning", "Dataset").objects.exclude(problems=[])
    for dataset in datasets.only("problems").iterator():
        kinds = {}
        for found in dataset.problems:
            key = found.get("code"), found.get("level"), found.get("member"), found["message"]
            kind = kinds.setdefault(key, {**found, "count": 0, "lines": []})
            kind["count"] += found.get("count", 1)
            if found.get("line") is not None:
                kind["lines"].append(found["line"])
        dataset.problems = sorted(kinds.values(), key=lambda kind: kind.get("level") != "error")
        dataset.save(update_fields=["problems"])


class Migration(migrations.Migration):
    dependencies = [("tuning", "0004_metric_divergence")]
    operations = [migrations.RunPython(by_kind, migrations.RunPython.noop)]
