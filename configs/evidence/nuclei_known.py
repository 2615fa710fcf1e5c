# Fluorescence images for the detector that knows such images.
_base_ = 'nuclei_stained.py'

file = 'annotations/few_fluorescence/rest.json'
val_dataloader = dict(dataset=dict(ann_file=file))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=_base_.data_root + file)
test_evaluator = val_evaluator
