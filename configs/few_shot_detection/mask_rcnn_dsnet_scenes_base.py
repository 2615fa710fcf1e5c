# The detector of the drawn scenes without its last class, "dotted star". The files of
# annotations: tools/dataset_converters/few_shot_coco.py --novel "dotted star".
_base_ = '../dsnet/mask_rcnn_dsnet_demo_scenes.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(type='dsnet_mm.CLIPAdapterBBoxHead', num_classes=3),
        mask_head=dict(num_classes=3),
    )
)
metainfo = dict(
    _delete_=True,
    classes=_base_.metainfo.classes[:3],
    palette=_base_.metainfo.palette[:3],
)
train_dataloader = dict(
    dataset=dict(
        metainfo=metainfo,
        ann_file='annotations/few_shot/base.json',
        data_prefix=dict(img=''),
    )
)
val_dataloader = dict(dataset=dict(metainfo=metainfo))
test_dataloader = val_dataloader
