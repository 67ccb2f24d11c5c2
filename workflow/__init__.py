"""The reproduction of the paper: rules for Snakemake, and the code behind its tables and figures."""
