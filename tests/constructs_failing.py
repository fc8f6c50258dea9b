"""What fails today, by test; the list shrinks as constructs are mended, and then goes."""

FAILING = {
    "test_prepared_in_either_mode_it_is_the_same": """
        FunctionalBatchNorm batch_norm_with_activation ChunkAndConcatenate padding_from_the_size
        StochasticDepth NoiseInTraining AuxiliaryHead ShapesDecide InPlace SelfAttention
        CrossAttention ScaledDotProduct Recurrent SeveralInputs DefaultArguments
    """,
    "test_without_quantization_it_is_the_float_network": """
        FunctionalBatchNorm-train batch_norm_with_activation-train ChunkAndConcatenate-train
        ChunkAndConcatenate-eval padding_from_the_size-train padding_from_the_size-eval
        StochasticDepth-train NoiseInTraining-train AuxiliaryHead-train ShapesDecide-train
        ShapesDecide-eval InPlace-train InPlace-eval Buffers-train forward_hooks-train
        forward_hooks-eval SelfAttention-train SelfAttention-eval CrossAttention-train
        CrossAttention-eval MaskedScores-train ScaledDotProduct-train ScaledDotProduct-eval
        Recurrent-train Recurrent-eval SeveralInputs-train SeveralInputs-eval DefaultArguments-train
        DefaultArguments-eval
    """,
    "test_training_differs_from_eval_where_the_float_network_does": """
        FunctionalBatchNorm batch_norm_with_activation ChunkAndConcatenate padding_from_the_size
        StochasticDepth NoiseInTraining AuxiliaryHead ShapesDecide InPlace SelfAttention
        CrossAttention ScaledDotProduct Recurrent SeveralInputs DefaultArguments
    """,
    "test_a_float_checkpoint_loads": """
        ChunkAndConcatenate padding_from_the_size ShapesDecide InPlace Buffers forward_hooks
        SelfAttention CrossAttention MaskedScores ScaledDotProduct Recurrent SeveralInputs
        DefaultArguments
    """,
    "test_copies_and_pickles_are_the_same": """
        ChunkAndConcatenate padding_from_the_size ShapesDecide InPlace Buffers PostponedAnnotations
        SelfAttention CrossAttention MaskedScores ScaledDotProduct Recurrent SeveralInputs
        DefaultArguments
    """,
    "test_gradients_reach_every_parameter_of_the_float_network": """
        FunctionalBatchNorm batch_norm_with_activation ChunkAndConcatenate padding_from_the_size
        StochasticDepth NoiseInTraining AuxiliaryHead ShapesDecide InPlace forward_hooks
        SelfAttention CrossAttention ScaledDotProduct Recurrent SeveralInputs DefaultArguments
    """,
    "test_attributes_of_its_own_stay": """
        OwnAttributes
    """,
    "test_onnx_runtime_gives_the_same_answers": """
        ChunkAndConcatenate InPlace CrossAttention Recurrent SeveralInputs DataclassOutput
    """,
    "test_every_layer_runs_in_int8": """
        FunctionalBatchNorm batch_norm_after_relu group_norm instance_norm ConvNext prelu
        ChunkAndConcatenate SplitInSizes ChannelShuffle Focus pixel_shuffle reflect_padding
        FunctionalPadding OneDimension ThreeDimensions weight_standardization OwnParameters InPlace
        Buffers CrossAttention EncoderLayer Recurrent SeveralInputs DictOutput DataclassOutput
        NestedOutput TopK
    """,
    "test_a_choice_by_values_is_refused_with_its_line": """
        DataDecides Item
    """,
}
