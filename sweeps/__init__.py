"""Many runs: planned, trained here or on SLURM, tuned and collected. Imports `scaling` and nothing of `analysis`.

Pipeline; each verb writes files that the next one reads, can be repeated, and does only what is missing::

    campaign.toml --plan--> plan.jsonl --submit--> runs/<id>/{spec,placement}.json --train--> metrics.jsonl, record.json
                  --collect--> results/<campaign>/runs.csv, curves.parquet

`submit` executes the recorded plan; if plan.jsonl is missing or was made from another campaign, settings, placement, data
or code, it plans anew and reports it. The state of a run follows from the files in its directory.

Import order: config < planning < local < slurm < tuning < reporting.
"""
