"""What stands around the trainer on a cluster: job scripts, submission, the decision after an attempt, what people look at.

Nothing here imports torch: the batch script asks these modules on the first node of a job.
"""
