//! The fields that every request for images has.

/// Declares the body of a request for images: the fields that are its own, and after them those that all such requests
/// have. These stand here alone, so one that is added reaches every endpoint.
///
/// It is a macro because serde's `flatten` would not refuse unknown fields, nor say which field has a wrong value.
macro_rules! drawing_request {
    (
        $(#[$about:meta])*
        struct $name:ident { $($(#[$own_about:meta])* $own:ident: $own_type:ty,)* }
    ) => {
        drawing_request! { @with {
            /// What a text-to-image model is to draw, or a class-conditional model's class, by name or number. Empty or
            /// absent for an unconditional model.
            #[schema(example = "Sneaker")]
            prompt: Option<String>,
            /// What guidance leads a text-to-image model away from; the empty prompt when absent.
            negative_prompt: Option<String>,
            /// How `prompt` and `negative_prompt` are written: `plain`, or `weighted`, where `(words:1.3)`, `(words)` and `[words]` count
            /// more or less, as in A1111's web UI.
            #[schema(default = "plain")]
            prompt_syntax: Option<PromptSyntax>,
            /// The class by number or name; not together with a prompt. Without either, every image's class is
            /// drawn from its seed.
            class_label: Option<ClassLabel>,
            /// `auto` for the model's own size, or `WIDTHxHEIGHT`: multiples of the model's `size_multiple` with at most
            /// `--max-pixels` pixels, or, of a model that makes one size, exactly that.
            #[schema(pattern = "^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", default = "auto")]
            size: Option<String>,
            /// Image `i` of every model of the request uses `(seed + i) mod 2^53`; the same seed gives the same image
            /// again. Drawn when absent.
            #[schema(minimum = 0, maximum = 9007199254740991i64)]
            seed: Option<i64>,
            /// How much of DDPM's noise a DDIM step adds, or how far a TCD step goes down before it adds noise; 0.3 for
            /// TCD when absent.
            #[schema(minimum = 0, maximum = 1, default = 0.0)]
            eta: Option<f64>,
            /// Classifier-free guidance, the model card's when absent; 1 is none. Other than 1 needs models that read
            /// prompts or have a null class, and doubles the evaluations, unless the network is told the scale.
            #[schema(minimum = -1000, maximum = 1000)]
            guidance_scale: Option<f64>,
            /// LoRAs that the server was given (`serve --lora NAME=FILE`), added to the model's weights; at most 8. Models with
            /// LoRAs are made when they are first asked for, and the last two of each model are kept.
            lora: Option<Vec<LoraUse>>,
            /// The images' format; where the reply can be an image, an image type in `Accept` wins.
            output_format: Option<OutputFormat>,
            /// Quality of JPEG, or of lossy WebP; WebP without it is lossless.
            #[schema(minimum = 0, maximum = 100)]
            output_compression: Option<i64>,
            /// Milliseconds from receipt after which the answer is worthless.
            #[schema(minimum = 1)]
            deadline_ms: Option<i64>,
        }
        $(#[$about])*
        struct $name { $($(#[$own_about])* $own: $own_type,)* }
        }
    };
    (
        @with { $($(#[$field_about:meta])* $field:ident: $type:ty,)* }
        $(#[$about:meta])*
        struct $name:ident { $($(#[$own_about:meta])* $own:ident: $own_type:ty,)* }
    ) => {
        $(#[$about])*
        #[derive(Debug, Clone, Default, Deserialize, ToSchema)]
        #[serde(deny_unknown_fields)]
        pub(in crate::http) struct $name {
            $($(#[$own_about])* pub(in crate::http) $own: $own_type,)*
            $($(#[$field_about])* pub(in crate::http) $field: $type,)*
        }

        /// A request to `/v1/images/generations` with the fields that all such requests have.
        impl From<&$name> for GenerationRequest {
            fn from(request: &$name) -> Self {
                Self { $($field: request.$field.clone(),)* ..Self::default() }
            }
        }
    };
}

/// Declares the body of a request to one model: the fields that are its own, those that all such requests have, and those of
/// [`drawing_request`].
macro_rules! generation_request {
    (
        $(#[$about:meta])*
        struct $name:ident { $($(#[$own_about:meta])* $own:ident: $own_type:ty,)* }
    ) => {
        generation_request! { @with {
            /// A model's id; absent for the server's default model. `draft` gives the image of the default
            /// model's student first and then its own; `auto` the default model's if that is predicted to meet
            /// the deadline, else its student's; `experiment:ID` one of an experiment's arms.
            #[schema(example = "fashion-mnist-teacher")]
            model: Option<String>,
            /// How many images; at most the server's `--max-images-per-request`.
            #[schema(minimum = 1, default = 1)]
            n: Option<i64>,
            /// Steps of the sampler, to the schedule's number of training steps; the model card's when absent.
            #[schema(minimum = 1)]
            num_inference_steps: Option<i64>,
            /// The sampler; the model card's when absent.
            #[schema(value_type = Option<Scheduler>)]
            scheduler: Option<String>,
            /// `b64_json`; the server keeps no images, so it has no URLs to give.
            #[schema(pattern = "^b64_json$")]
            response_format: Option<String>,
            /// Server-sent events instead of one reply.
            #[schema(default = false)]
            stream: Option<bool>,
            /// Previews per image while streaming.
            #[schema(minimum = 0, maximum = 3, default = 0)]
            partial_images: Option<i64>,
            /// Who asks: of an experiment always the same arm serves them. The header `x-understudy-key` wins.
            user: Option<String>,
            /// Accepted for OpenAI's clients and ignored.
            #[serde(rename = "quality")]
            _quality: Option<String>,
            /// Accepted for OpenAI's clients and ignored.
            #[serde(rename = "background")]
            _background: Option<String>,
        }
        $(#[$about])*
        struct $name { $($(#[$own_about])* $own: $own_type,)* }
        }
    };
    (
        @with { $($(#[$field_about:meta])* $field:ident: $type:ty,)* }
        $(#[$about:meta])*
        struct $name:ident { $($(#[$own_about:meta])* $own:ident: $own_type:ty,)* }
    ) => {
        drawing_request! {
            $(#[$about])*
            struct $name {
                $($(#[$own_about])* $own: $own_type,)*
                $($(#[$field_about])* $field: $type,)*
            }
        }

        impl $name {
            /// A request to `/v1/images/generations` with the fields that it has, too.
            // Of such a request itself nobody asks for it.
            #[allow(dead_code)]
            pub(in crate::http) fn generation(&self) -> GenerationRequest {
                GenerationRequest { $($field: self.$field.clone(),)* ..self.into() }
            }
        }
    };
}
