"""`manage.py create_api_key USER`: prints the key and nothing else, so that a script can take
it.
"""

from django.core.management.base import BaseCommand, CommandError

from portal.models import ApiKey, User


class Command(BaseCommand):
    help = (
        "Create an API key for a user and print it. Only its hash is kept. Example: "
        "create_api_key admin --name laptop"
    )

    def add_arguments(self, parser):
        parser.add_argument("user")
        parser.add_argument("--name", default="", help="what the key is for")

    def handle(self, *, user, name, **options):
        owner = User.objects.filter(username=user, is_active=True).first()
        if owner is None:
            raise CommandError(f"There is no active user named {user!r}.")
        _key, secret = ApiKey.create_for(owner, name)
        self.stdout.write(secret)
