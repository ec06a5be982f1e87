"""The frozen plan in the shape that tuning runs have: what is read under "dataset" and
"checkpoint", the adapter under "adapter".
"""

from django.db import migrations


def nest(apps, schema_editor):
    EvaluationRun = apps.get_model("evaluation", "EvaluationRun")
    runs = EvaluationRun.objects.select_related("dataset_version")
    for run in runs.exclude(recipe={}).iterator():
        recipe = dict(run.recipe)
        if isinstance(recipe.get("dataset"), dict):
            continue
        split = recipe.pop("split", run.split)
        entry = (run.dataset_version.splits or {}).get(split, {})
        recipe["dataset"] = {
            "id": run.dataset_version.dataset_id,
            "name": recipe.get("dataset", ""),
            "version": recipe.pop("dataset_version", run.dataset_version.number),
            "split": split,
            "sha256": recipe.pop("dataset_sha256", ""),
            "rows": entry.get("rows", recipe.get("rows", 0)),
        }
        recipe["checkpoint"] = {
            "id": run.checkpoint_id,
            "name": recipe.get("checkpoint", ""),
            "fingerprint": recipe.pop("checkpoint_fingerprint", ""),
        }
        if "adapter" in recipe:
            recipe["adapter"] = {
                "name": recipe["adapter"],
                "sha256": recipe.pop("adapter_sha256", ""),
                "pre_seq_len": recipe.pop("pre_seq_len", 0),
            }
        EvaluationRun.objects.filter(pk=run.pk).update(recipe=recipe)


class Migration(migrations.Migration):
    dependencies = [
        ("evaluation", "0003_evaluationrun_difference"),
        ("portal", "0002_run_phases_and_kinds"),
    ]

    operations = [migrations.RunPython(nest, migrations.RunPython.noop, elidable=True)]
