from django.db import migrations

from tuning.datasets.files import Split


def look_into_the_rows(apps, schema_editor):
    """Adapters published before they knew whether their training rows had earlier turns."""
    runs = apps.get_model("tuning", "TuningRun").objects.select_related("dataset_version")
    for adapter in apps.get_model("chat", "Adapter").objects.filter(with_history=None):
        run = runs.filter(pk=adapter.run_id).first()
        if run is None:
            continue
        name = run.recipe.get("dataset", {}).get("split", "train")
        try:
            with Split(run.dataset_version.splits[name]["sha256"]) as rows:
                adapter.with_history = rows.has_history()
        except (OSError, KeyError, ValueError):  # the files are gone: nobody knows
            continue
        adapter.save(update_fields=["with_history"])


class Migration(migrations.Migration):
    dependencies = [
        ("tuning", "0005_problems_by_kind"),
        ("chat", "0005_with_history"),
    ]

    operations = [migrations.RunPython(look_into_the_rows, migrations.RunPython.noop)]
