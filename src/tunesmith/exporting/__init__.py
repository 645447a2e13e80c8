"""A trained model in the form that another program runs, with a certificate that it is still the same."""
