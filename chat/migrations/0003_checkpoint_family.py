from django.db import migrations


def name_the_family(apps, schema_editor):
    """Checkpoints described before there was `family` in the description."""
    for checkpoint in apps.get_model("chat", "Checkpoint").objects.all():
        description = checkpoint.description
        if "architecture" in description and "family" not in description:
            chatglm = str(description["architecture"]).startswith("ChatGLM")
            description["family"] = "chatglm" if chatglm else "causal"
            checkpoint.save(update_fields=["description"])


class Migration(migrations.Migration):
    dependencies = [("chat", "0002_initial")]

    operations = [migrations.RunPython(name_the_family, migrations.RunPython.noop)]
