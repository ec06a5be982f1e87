from django.db import migrations, models

import portal.models


class Migration(migrations.Migration):
    dependencies = [("portal", "0002_run_phases_and_kinds")]

    operations = [
        # Runs of earlier versions keep their folders, which have no key in the name.
        migrations.AddField(
            model_name="run",
            name="key",
            field=models.CharField(blank=True, default="", editable=False, max_length=8),
            preserve_default=False,
        ),
        migrations.AlterField(
            model_name="run",
            name="key",
            field=models.CharField(
                blank=True, default=portal.models.new_run_key, editable=False, max_length=8
            ),
        ),
        migrations.AddField(
            model_name="run",
            name="interrupted_at",
            field=models.DateTimeField(editable=False, null=True),
        ),
    ]
