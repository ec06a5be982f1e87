from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("portal", "0001_initial")]

    operations = [
        # who carries a run out follows from its kind (portal/runs/work.py)
        migrations.RemoveField(model_name="run", name="task"),
        migrations.AlterField(
            model_name="run",
            name="phase",
            field=models.CharField(
                blank=True,
                choices=[
                    ("starting", "starting"),
                    ("waiting", "waiting for the device"),
                    ("loading", "loading the model"),
                    ("training", "training"),
                    ("predicting", "predicting"),
                    ("saving", "saving"),
                ],
                editable=False,
                max_length=40,
                verbose_name="phase",
            ),
        ),
    ]
