"""A model -> its HellaSwag score."""
