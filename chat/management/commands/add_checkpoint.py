"""`manage.py add_checkpoint PATH`: a local Hugging Face folder becomes a base checkpoint."""

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError

from chat.registry import register_checkpoint


class Command(BaseCommand):
    help = (
        "Register a local Hugging Face folder (ChatGLM-6B, Qwen, GLM, Llama ...) as a base "
        "checkpoint. "
        "Example: add_checkpoint /models/chatglm-6b --name chatglm-6b --default"
    )

    def add_arguments(self, parser):
        parser.add_argument(
            "path", help="the folder with config.json, weights and tokenizer; it is not copied"
        )
        parser.add_argument(
            "--name", help="how people and the API call it (default: the folder's name)"
        )
        parser.add_argument("--default", action="store_true", help="serve it from now on")

    def handle(self, *, path, name, default, **options):
        try:
            checkpoint = register_checkpoint(path, name, default=default)
        except ValidationError as error:
            raise CommandError(" ".join(error.messages)) from error
        told = checkpoint.description
        millions = (
            f"{told['parameters'] / 1e6:,.1f} M parameters, " if told.get("parameters") else ""
        )
        self.stdout.write(
            f"{checkpoint.name}: {told['architecture']}, {millions}context "
            f"{told['context_length']}, "
            f"{told['bytes'] / 2**20:,.0f} MiB, fingerprint {checkpoint.fingerprint[:12]}"
        )
        if checkpoint.is_default:
            self.stdout.write(
                "It is the default: the worker serves it as soon as it has loaded it."
            )
        else:
            self.stdout.write("Add --default to serve it.")
