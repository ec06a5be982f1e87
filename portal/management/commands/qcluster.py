"""django-q2's own command, whose processes additionally end when their parent does.

Unchanged, a killed cluster leaves orphans that go on consuming beside its successor
(docs/architecture.md, "Long work").
"""

import os
import signal

from django_q.management.commands.qcluster import Command as ClusterCommand

from portal.runs.children import end_with_parent


class Command(ClusterCommand):
    def handle(self, *args, **options):
        os.register_at_fork(after_in_child=lambda: end_with_parent(signal.SIGKILL))
        super().handle(*args, **options)
