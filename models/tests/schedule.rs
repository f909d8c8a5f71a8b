//! What scheduler configurations and requests are read, and which are refused, by what name.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use serde_json::{Value, json};
use understudy_models::Error;
use understudy_models::sampler::{Kind, trajectory};
use understudy_models::schedule::{Class, ScheduleConfig};

/// A configuration with some fields, of that class.
fn config(kind: Kind, fields: &Value) -> ScheduleConfig {
    read(kind.class(), fields).unwrap()
}

fn read(class: Class, fields: &Value) -> Result<ScheduleConfig, Error> {
    let mut fields = fields.clone();
    fields["_class_name"] = class.name().into();
    if class == Class::Pndm && fields.get("skip_prk_steps").is_none() {
        fields["skip_prk_steps"] = true.into();
    }
    ScheduleConfig::from_json(&fields, "scheduler/scheduler_config.json")
}

fn refusal<T: std::fmt::Debug>(result: Result<T, Error>) -> (String, String) {
    match result.unwrap_err() {
        Error::Value { field, value, .. } => (field, value),
        other => panic!("{other}"),
    }
}

const FIELDS: &[&str] = &[
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "variance_type",
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "solver_type",
    "lower_order_final",
    "euler_at_final",
    "final_sigmas_type",
    "lambda_min_clipped",
    "_use_default_values",
    "algorithm_type",
    "solver_order",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "sigma_min",
    "sigma_max",
    "skip_prk_steps",
    "original_inference_steps",
    "timestep_scaling",
    "shift",
    "shift_terminal",
    "stochastic_sampling",
    "use_dynamic_shifting",
];

fn odd_value() -> impl Strategy<Value = Value> {
    let values = [
        json!(null),
        json!(true),
        json!(false),
        json!(0),
        json!(1),
        json!(2),
        json!(7),
        json!(-3),
        json!(0.5),
        json!(1e-300),
        json!(1e300),
        json!(u64::MAX),
        json!("linear"),
        json!("squaredcos_cap_v2"),
        json!("trailing"),
        json!("learned"),
        json!("sigma_min"),
        json!("heun"),
        json!([]),
        json!([0.5, 0.1]),
        json!(["beta_start"]),
        json!({ "a": 1 }),
    ];
    prop::sample::select(values.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever a file says, it is read or refused, and so is every request to it: nothing panics.
    #[test]
    fn odd_files_are_read_or_refused(
        class in prop::sample::select(Class::ALL),
        fields in prop::collection::hash_map(prop::sample::select(FIELDS), odd_value(), 0..4),
        steps in 0_usize..12,
        learned in any::<bool>(),
    ) {
        let fields: serde_json::Map<_, _> =
            fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        if let Ok(config) = read(class, &Value::Object(fields)) {
            for kind in Kind::ALL {
                if let Ok(trajectory) = trajectory(&config, kind, steps, 0.0, learned) {
                    prop_assert!(!trajectory.is_empty());
                }
            }
        }
    }
}

#[test]
fn requests_out_of_range_are_refused_by_name() {
    let config = config(Kind::Ddim, &json!({ "num_train_timesteps": 100 }));
    for steps in [0, 101] {
        for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::FlowEuler) {
            let (field, value) = refusal(trajectory(&config, kind, steps, 0.0, false));
            assert_eq!((field.as_str(), value), ("num_inference_steps", steps.to_string()));
        }
    }
    for (kind, eta) in
        [(Kind::Ddim, -0.1), (Kind::Ddim, 1.1), (Kind::Ddim, f64::NAN), (Kind::Euler, 0.5)]
    {
        assert_eq!(refusal(trajectory(&config, kind, 10, eta, false)).0, "eta");
    }
    let message = "plms".parse::<Kind>().unwrap_err().to_string();
    assert!(
        message.contains(
            "ddpm, ddim, dpm++, euler, heun, pndm, euler-ancestral, lcm, tcd, flow-euler"
        ),
        "{message}"
    );
    assert!(Kind::ALL.iter().all(|kind| kind.to_string().parse::<Kind>().unwrap() == *kind));
}

#[test]
fn steps_offset_past_the_end_is_refused() {
    let config = config(Kind::Ddim, &json!({ "steps_offset": 1 }));
    assert!(trajectory(&config, Kind::Ddim, 500, 0.0, false).is_ok());
    assert_eq!(refusal(trajectory(&config, Kind::Ddim, 1000, 0.0, false)).0, "num_inference_steps");
}

#[test]
fn fields_that_cannot_be_honoured_are_refused_by_name() {
    let own = [
        (Class::DpmSolverMultistep, "algorithm_type", json!("sde-dpmsolver++")),
        (Class::DpmSolverMultistep, "solver_order", json!(3)),
        (Class::DpmSolverMultistep, "use_lu_lambdas", json!(true)),
        (Class::DpmSolverMultistep, "use_flow_sigmas", json!(true)),
        (Class::DpmSolverMultistep, "lambda_min_clipped", json!(50.0)),
        (Class::Euler, "use_karras_sigmas", json!("yes")),
        (Class::Euler, "sigma_min", json!(0.0)),
        (Class::Heun, "sigma_max", json!(-1.0)),
        (Class::Pndm, "skip_prk_steps", json!(false)),
        (Class::Pndm, "prediction_type", json!("sample")),
        (Class::Lcm, "original_inference_steps", json!(0)),
        (Class::Lcm, "original_inference_steps", json!(2000)),
        (Class::Lcm, "timestep_scaling", json!(0.0)),
        (Class::Tcd, "original_inference_steps", json!("50")),
        (Class::FlowMatchEuler, "shift", json!(0.0)),
        (Class::FlowMatchEuler, "shift_terminal", json!(1.0)),
        (Class::FlowMatchEuler, "use_dynamic_shifting", json!(true)),
        (Class::FlowMatchEuler, "invert_sigmas", json!(true)),
        (Class::Euler, "interpolation_type", json!("log_linear")),
        (Class::Euler, "timestep_type", json!("continuous")),
        (Class::Ddpm, "beta_schedule", json!("laplace")),
        (Class::Ddpm, "prediction_type", json!("flow_prediction")),
        (Class::Ddpm, "variance_type", json!("median")),
        (Class::Ddpm, "timestep_spacing", json!("random")),
        (Class::Ddpm, "num_train_timesteps", json!(0)),
        (Class::Ddpm, "num_train_timesteps", json!(1000.5)),
        (Class::Ddpm, "num_train_timesteps", json!(u64::MAX)),
        (Class::Ddpm, "beta_start", json!(0.0)),
        (Class::Ddpm, "beta_end", json!(1.0)),
        (Class::Ddpm, "beta_end", json!("0.02")),
        (Class::Ddpm, "beta_start", Value::Null),
        (Class::Ddpm, "clip_sample", json!("yes")),
        (Class::Ddpm, "clip_sample_range", json!(-1.0)),
        (Class::Ddpm, "dynamic_thresholding_ratio", json!(1.5)),
        (Class::Ddpm, "steps_offset", json!(-1)),
        (Class::Ddpm, "trained_betas", json!([0.1, 0.2])),
        (Class::Ddpm, "trained_betas", json!(0.1)),
    ];
    for (class, field, value) in own {
        let (named, found) = refusal(read(class, &json!({ field: value })));
        assert!(named.ends_with(&format!("scheduler_config.json: {field}")), "{named}");
        assert!(!found.is_empty());
    }
    let third = refusal(read(
        Class::Ddpm,
        &json!({ "trained_betas": [0.1, 0.2, 2.0], "num_train_timesteps": 3 }),
    ));
    assert!(third.0.ends_with("trained_betas[2]"), "{third:?}");

    // Another class's field is another class's affair.
    let ddpm = config(Kind::Ddpm, &json!({ "timestep_type": "continuous", "unheard_of": 1 }));
    assert!(trajectory(&ddpm, Kind::Ddim, 10, 0.0, false).is_ok());
    let (field, _) = refusal(trajectory(&ddpm, Kind::Euler, 10, 0.0, false));
    assert!(field.ends_with("timestep_type"));

    let both = json!({ "use_karras_sigmas": true, "use_beta_sigmas": true });
    assert!(refusal(read(Class::Euler, &both)).0.ends_with("use_beta_sigmas"));
    let crossed = config(Kind::Euler, &json!({ "use_karras_sigmas": true, "sigma_min": 1000.0 }));
    assert!(refusal(trajectory(&crossed, Kind::Euler, 5, 0.0, false)).0.ends_with("sigma_min"));
    let absent = ScheduleConfig::from_text(r#"{"_class_name": "PNDMScheduler"}"#, "f").unwrap_err();
    assert!(absent.to_string().contains("skip_prk_steps"), "{absent}");
    let lcm = config(Kind::Lcm, &json!({ "original_inference_steps": 8 }));
    let (field, value) = refusal(trajectory(&lcm, Kind::Lcm, 9, 0.0, false));
    assert_eq!((field.as_str(), value.as_str()), ("num_inference_steps", "9"));

    // Networks trained by flow matching and others need samplers of their own.
    let flow = config(Kind::FlowEuler, &json!({}));
    for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::FlowEuler) {
        assert!(refusal(trajectory(&flow, kind, 10, 0.0, false)).0.ends_with("_class_name"));
        let (field, _) = refusal(trajectory(&ddpm, Kind::FlowEuler, 10, 0.0, false));
        assert!(field.ends_with("_class_name"));
    }

    let learned = config(Kind::Ddpm, &json!({ "variance_type": "learned_range" }));
    assert!(trajectory(&learned, Kind::Ddim, 10, 0.0, false).is_ok());
    let (field, _) = refusal(trajectory(&learned, Kind::Ddpm, 10, 0.0, false));
    assert!(field.ends_with("variance_type"));

    for text in
        ["[]", "{}", r#"{"_class_name": "UniPCMultistepScheduler"}"#, r#"{"_class_name": 3}"#]
    {
        let error = ScheduleConfig::from_text(text, "file.json").unwrap_err().to_string();
        assert!(error.contains("file.json"), "{error}");
    }
    let unknown = ScheduleConfig::from_text(r#"{"_class_name": "X"}"#, "f").unwrap_err();
    assert!(unknown.to_string().contains("HeunDiscreteScheduler"), "{unknown}");
}

#[test]
fn betas_that_make_no_schedule_are_refused() {
    for beta in [1e-17, 0.999_999] {
        let fields = json!({ "trained_betas": vec![beta; 50], "num_train_timesteps": 50 });
        assert!(refusal(read(Class::Ddpm, &fields)).0.ends_with("trained_betas"));
    }
    let one = json!({ "num_train_timesteps": 1, "rescale_betas_zero_snr": true });
    assert!(refusal(read(Class::Ddpm, &one)).0.ends_with("rescale_betas_zero_snr"));
    for kind in Kind::ALL {
        let one = config(kind, &json!({ "num_train_timesteps": 1 }));
        assert_eq!(trajectory(&one, kind, 1, 0.0, false).unwrap().len(), 1);
    }
}

#[test]
fn configurations_survive_a_round_trip() {
    let text = r#"{"_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": "0.39.0",
        "beta_end": 0.012, "beta_schedule": "scaled_linear", "lambda_min_clipped": -Infinity,
        "variance_type": null, "solver_order": 2, "note": "NaN and \"Infinity\"",
        "timestep_spacing": "trailing", "_use_default_values": ["timestep_spacing"]}"#;
    let config = ScheduleConfig::from_text(text, "f").unwrap();
    assert_eq!(config.timestep_spacing, None);
    assert_eq!(config.beta_end, Some(0.012));
    let written = config.to_json();
    assert_eq!(written["note"], "NaN and \"Infinity\"");
    assert_eq!(written["_diffusers_version"], "0.39.0");
    assert_eq!(written.get("lambda_min_clipped"), None);
    assert_eq!(ScheduleConfig::from_json(&written, "f").unwrap(), config);
}

#[test]
fn a_folder_without_a_card_takes_ddim_for_ddpm() {
    let default = |class| Kind::for_scheduler_class(&ScheduleConfig::new(class));
    assert_eq!(default(Class::Ddpm), Kind::Ddim);
    assert_eq!(default(Class::Ddim), Kind::Ddim);
    assert_eq!(default(Class::DpmSolverMultistep), Kind::DpmSolverPlusPlus);
    assert_eq!(default(Class::Heun), Kind::Heun);
    assert_eq!(default(Class::Pndm), Kind::Pndm);
    assert_eq!(default(Class::EulerAncestral), Kind::EulerAncestral);
    assert_eq!(default(Class::Lcm), Kind::Lcm);
    assert_eq!(default(Class::Tcd), Kind::Tcd);
    assert_eq!(default(Class::FlowMatchEuler), Kind::FlowEuler);
}
