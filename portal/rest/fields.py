"""Fields of REST bodies that take less than DRF's."""

from django.db import models
from rest_framework import serializers


class Text(serializers.CharField):
    """A text; DRF would also take a number, as its digits. A form's fields are texts always."""

    def to_internal_value(self, data):
        if not isinstance(data, str):
            self.fail("invalid")
        return super().to_internal_value(data)


class Texts:  # a mixin for ModelSerializer; a docstring would stand in the schema
    # the model's texts are `Text`
    serializer_field_mapping = {
        **serializers.ModelSerializer.serializer_field_mapping,
        models.CharField: Text,
        models.TextField: Text,
    }
