from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("chat", "0004_fetch_runs_and_hubs")]

    operations = [
        migrations.AddField(
            model_name="adapter",
            name="with_history",
            field=models.BooleanField(
                blank=True, null=True, verbose_name="trained on conversations"
            ),
        ),
        migrations.AddField(
            model_name="message",
            name="with_history",
            field=models.BooleanField(default=True, verbose_name="with the earlier turns"),
        ),
    ]
