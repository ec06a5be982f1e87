"""`manage.py create_api_key USER`: prints the key and nothing else, so that a script can take
it.
"""

from datetime import timedelta

from django.core.management.base import BaseCommand
from django.utils import timezone

from portal.models import ApiKey
from portal.terminal import user_named


class Command(BaseCommand):
    help = (
        "Create an API key for a user and print it. Only its hash is kept. Example: "
        "create_api_key admin --name laptop"
    )

    def add_arguments(self, parser):
        parser.add_argument("user")
        parser.add_argument("--name", default="", help="what the key is for")
        parser.add_argument(
            "--scopes",
            nargs="+",
            choices=list(ApiKey.Scope),
            default=list(ApiKey.Scope),
            help="what it may be used for (default: everything that the user may do)",
        )
        parser.add_argument("--days", type=int, help="how long it is valid (default: for ever)")
        parser.add_argument("--requests-per-minute", type=int)
        parser.add_argument("--tokens-per-day", type=int)

    def handle(self, *, user, name, scopes, days, **options):
        _key, secret = ApiKey.create_for(
            user_named(user),
            name,
            scopes=scopes,
            expires_at=days and timezone.now() + timedelta(days=days),
            requests_per_minute=options["requests_per_minute"],
            tokens_per_day=options["tokens_per_day"],
        )
        self.stdout.write(secret)
